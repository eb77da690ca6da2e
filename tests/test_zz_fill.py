import os, re, shlex, subprocess
from pathlib import Path
import pytest
import importlib.util
_s = importlib.util.spec_from_file_location("td", Path(__file__).with_name("test_docs.py")); td = importlib.util.module_from_spec(_s); _s.loader.exec_module(td)
workplace = td.workplace
@pytest.mark.parametrize("page", [p for p in td.PAGES if p.name in os.environ["FILL"].split(",")], ids=lambda p: p.name)
def test_fill(page, workplace, capsys):
    from lorafit.app import cli
    text = page.read_text()
    def block(m):
        out = []
        for command, lines, code in td.commands(m[1]):
            verb, *words = shlex.split(command)
            if verb == "lorafit":
                capsys.readouterr(); rc = cli.main(words); s = capsys.readouterr(); printed = s.out + s.err
            else:
                d = subprocess.run(["sh", "-c", command], capture_output=True, text=True); rc, printed = d.returncode, d.stdout + d.stderr
            out.append("$ " + command)
            if lines and any("…" in l for l in lines) and td.shown(lines).fullmatch(printed): out += lines
            else: out += [l.rstrip() for l in printed.splitlines()]
            if rc: out.append(f"(exit code {rc})")
        return "```console\n" + "\n".join(out) + "\n```"
    page.write_text(re.sub(r"```console\n(.*?)```", block, text, flags=re.S))
