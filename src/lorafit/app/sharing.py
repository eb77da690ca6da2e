"""The verbs that hand a result to others: push it to the hub, put a run on a page."""

from dataclasses import dataclass
from pathlib import Path

from lorafit.app.common import need
from lorafit.app.options import bare
from lorafit.config import knob
from lorafit.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class PushConfig:
    """What goes to the hub, and where"""

    adapter: str = knob("", "folder of an adapter, of a run, or of a merged model")
    to: str = knob("", "owner/name on the hub")
    run: str | None = knob(None, "folder of the run, for the model card; none: the folder that the adapter is in")
    base_model: str | None = knob(None, "the base model's name on the hub, where the run had it from a folder")
    license: str | None = knob(None, "licence to state in the model card, as the hub spells it; none: left to you")
    public: bool = knob(False, "let everybody see it; a new repository is private otherwise")
    message: str = knob("Upload with lorafit", "message of the commit")
    stall: float = knob(300.0, "give up after so many seconds in which not a byte moved")
    dry_run: bool = knob(False, "print the list of files and the model card, and send nothing")

    def __post_init__(self) -> None:
        if not self.stall > 0:
            raise UsageError(f"stall must be greater than 0, not {self.stall!r}")


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """The run"""

    run: str = knob("", "folder of the run")
    page: str | None = knob(None, "file to write; none: report.html in that folder")


@bare("adapter", "to")
def push(what: PushConfig) -> None:
    """Upload an adapter or a merged model to the hub, private, with a model card made from its run."""
    need("push", adapter=what.adapter, to=what.to)
    from lorafit.app import hub

    parcel = hub.pack(what.adapter, what.to, run=what.run, base_model=what.base_model, license=what.license)
    print(f"to {what.to}, {'for everybody to see' if what.public else 'private'}:\n{parcel}")
    if what.dry_run:
        print(f"\n{parcel.texts['README.md']}")
    else:
        print(hub.send(parcel, what.to, public=what.public, message=what.message, stall=what.stall))


@bare("run")
def report(what: ReportConfig) -> None:
    """Put a run on one HTML page that needs no other file and no network: curves, answers, layers, data, settings."""
    need("report", run=what.run)
    from lorafit.app.report import write_report
    from lorafit.app.runs import read_run

    run = read_run(Path(what.run))
    page = Path(what.page).expanduser() if what.page else run.folder / "report.html"
    write_report(run, page)
    print(page)
