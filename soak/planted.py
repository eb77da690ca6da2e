"""Bugs planted one by one, as a person would make them: does the test suite find each?"""

from pathlib import Path
from typing import NamedTuple

from soak.state import ROOT
from soak.trial import check_untouched, suite_fails

NAME = "planted"
WHAT = "every bug planted in a copy of the code is found by the tests that mirror it"
LIMIT = 3600.0
SOURCES = ("src", "soak", "tests")


class Bug(NamedTuple):
    """In `file` (below src/lorafit) `old`, which stands there once, becomes `new`; `tests` (below tests/) find it."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


LAYERS, FUSED, INJECT = ("lora/test_layers.py",), ("lora/test_fused.py",), ("lora/test_inject.py",)
WEIGHTS, IDENTITY = ("lora/test_weights.py",), ("lora/test_identity.py",)
LOSS, ATTENTION, OPTIM = ("training/test_loss.py",), ("training/test_attention.py",), ("training/test_optim.py",)
LOOP, NUMBERS, RESUME = ("training/test_loop.py",), ("training/test_numbers.py",), ("training/test_checkpoint.py",)
BATCHES, CHAT, GENERATE = ("data/test_batches.py",), ("data/test_chat.py",), ("model/test_generate.py",)
PEFT, HEADER = ("adapter/test_peft_format.py",), ("adapter/test_weights_file.py",)
SCHEMA, LOCKS = ("adapter/test_peft_config.py",), ("test_locks.py",)
FILES = ("test_files.py", "test_reliability.py")

BUGS = (
    # The formulas.
    Bug("scale off by r", "lora/layers.py", "else alpha / r\n", "else alpha\n", LAYERS),
    Bug("rsLoRA's root of the wrong degree", "lora/layers.py", "alpha / r**0.5", "alpha / r**0.25", LAYERS),
    Bug("rsLoRA's flag ignored", "lora/layers.py", "alpha / r**0.5 if rslora else", "alpha / r if rslora else", LAYERS),
    Bug("A and B swapped", "lora/layers.py", "return self.lora_A.weight, self.lora_B.weight",
        "return self.lora_B.weight, self.lora_A.weight", LAYERS),
    Bug("update counted twice in the merge", "lora/layers.py", "return self.scale * (B @ A)",
        "return 2 * self.scale * (B @ A)", LAYERS),
    Bug("merge summed in the stored dtype", "lora/layers.py",
        "return (W.to(factor_dtype(W)) + self.delta()).to(W.dtype)", "return W + self.delta().to(W.dtype)", LAYERS),
    Bug("dropout in evaluation", "lora/layers.py", "nn.Identity) or not self.training else self.dropout(rows)",
        "nn.Identity) else F.dropout(rows, self.dropout.p)", LAYERS),
    Bug("dropout after A instead of before", "lora/layers.py", "F.linear(F.linear(self.dropout(x), A.to(x.dtype)),",
        "F.linear(self.dropout(F.linear(x, A.to(x.dtype))),", LAYERS),
    Bug("switched off, but not the fused way", "lora/layers.py", "        if not self.enabled:\n            result: ",
        "        if not self.enabled and not self._plain(x):\n            result: ", INJECT),
    Bug("hooks of the base passed by", "lora/layers.py",
        "            and not (base._forward_hooks or base._forward_pre_hooks or"
        " base._backward_hooks or base._backward_pre_hooks)\n",
        "", FUSED),
    Bug("factors kept in the base's dtype", "lora/inits.py", "return torch.promote_types(W.dtype, torch.float32)",
        "return W.dtype", LAYERS),
    Bug("A of the wrong size", "lora/inits.py", "a=math.sqrt(5)", "a=math.sqrt(2)", LAYERS),
    Bug("B not at 0", "lora/inits.py", "B = torch.zeros(out_features, r", "B = 1e-3 * torch.ones(out_features, r",
        LAYERS),
    Bug("DoRA's norm down the columns", "lora/layers.py", "norm = V.square().sum(dim=1)",
        "norm = V.square().sum(dim=0)", LAYERS),
    Bug("DoRA's norm not detached", "lora/layers.py", "    @torch.no_grad()\n    def row_norm", "    def row_norm",
        LAYERS),
    Bug("DoRA's norm without the cross term's 2", "lora/layers.py", "2 * self.scale * cross", "self.scale * cross",
        LAYERS),
    Bug("DoRA scales the bias", "lora/layers.py", "Wx = y if self.bias is None else y - self.bias", "Wx = y", LAYERS),
    Bug("Gemma's embedding gain left out", "lora/layers.py", 'getattr(self.base_layer, "embed_scale", 1.0)', "1.0",
        (*INJECT, "test_peft_parity.py")),
    Bug("embedding update read from the wrong row", "lora/layers.py", "F.embedding(tokens, A.T)",
        "F.embedding(tokens.flip(-1), A.T)", LAYERS),
    Bug("a module trained in full is the original itself", "lora/layers.py", "self.trained = copy.deepcopy(base_layer)",
        "self.trained = copy.copy(base_layer)", LAYERS + INJECT),
    # The hand-written backward.
    Bug("bias dropped", "lora/fused.py", "F.linear(x, weight, bias)", "F.linear(x, weight)", FUSED),
    Bug("scale missing in B's gradient", "lora/fused.py", ".to(B.dtype).mul_(ctx.scale)", ".to(B.dtype)", FUSED),
    Bug("scale missing in A's gradient", "lora/fused.py", "(grad @ B.to(grad.dtype)).mul_(ctx.scale)",
        "grad @ B.to(grad.dtype)", FUSED),
    Bug("the adapter's share of x's gradient lost", "lora/fused.py", "grad_x.addmm_(k, A.to(k.dtype))", "pass", FUSED),
    Bug("the undropped x in A's gradient", "lora/fused.py",
        "ctx.save_for_backward(x if dropped is None else dropped, h,", "ctx.save_for_backward(x, h,", FUSED),
    # Weights, planning, taking off, merging.
    Bug("tied weights stay tied", "lora/weights.py",
        "layer.weight = nn.Parameter(weight.to(old.dtype).contiguous(), requires_grad=old.requires_grad)",
        "old.data.copy_(weight)", WEIGHTS),
    Bug("Conv1D read without the transpose", "lora/weights.py", "    return _dense(layer).T\n",
        "    return _dense(layer) if isinstance(layer, Conv1D) else _dense(layer).T\n", WEIGHTS),
    Bug("alpha_pattern ignored", "lora/inject.py", "float(_resolve(config.alpha_pattern, name, config.alpha))",
        "float(config.alpha)", INJECT),
    Bug("rank_pattern ignored", "lora/inject.py", "int(_resolve(config.rank_pattern, name, config.r))", "int(config.r)",
        INJECT),
    Bug("the shortest pattern wins", "lora/inject.py", "pattern[max(keys, key=len)]", "pattern[min(keys, key=len)]",
        INJECT),
    Bug("exclude ignored", "lora/inject.py", "if not matches(exclude, name)]", "if not matches((), name)]", INJECT),
    Bug("layers ignored", "lora/inject.py", "if numbers[name] in config.layers]", "if numbers]", INJECT),
    Bug("all-linear takes the head too", "lora/inject.py", " and m is not head]", "]", INJECT),
    Bug("name endings without the dot", "lora/inject.py", 'name.endswith(f".{entry}")', "name.endswith(entry)", INJECT),
    Bug("base left trainable", "lora/inject.py",
        "    for parameter in model.parameters():\n        parameter.requires_grad_(False)\n", "", INJECT),
    Bug("requires_grad not given back", "lora/inject.py", "        _restore(model, found.flags)\n", "", INJECT),
    Bug("requires_grad not given back when an init fails", "lora/inject.py",
        "        _restore(model, flags)\n        raise", "        raise", INJECT),
    Bug("switched off for good", "lora/inject.py", "            layer.enabled = enabled\n",
        "            layer.enabled = False\n", INJECT),
    Bug("merged without a look for NaN", "lora/inject.py", "    if bad:\n", "    if False:\n", INJECT),
    Bug("untied, but the configuration does not say so", "lora/inject.py", "part.tie_word_embeddings = False", "pass",
        INJECT),
    Bug("wrappers in training mode", "lora/inject.py", "        wrapper.train(model.training)\n", "", INJECT),
    # Loss.
    Bug("soft cap ignored", "training/loss.py", "float | None]:\n    cap = getattr(config,",
        "float | None]:\n    cap = None and getattr(config,", LOSS),
    Bug("soft cap's slope missing in the gradient", "training/loss.py", "p.mul_(slope)", "p", LOSS),
    Bug("head's scale missing in the gradient", "training/loss.py", "expected.mul_(scale)", "expected",
        LOSS),
    Bug("the last tile of words left out", "training/loss.py", "for start in range(0, vocab, TILE)",
        "for start in range(0, max(1, vocab - TILE), TILE)", LOSS),
    Bug("earlier tiles not rescaled", "training/loss.py", "mass.mul_(shrink)", "mass", LOSS),
    Bug("the outer gradient ignored", "training/loss.py", "return gradient * grad.to(gradient.dtype)",
        "return gradient", LOSS),
    Bug("a mean where the sum belongs", "training/loss.py", 'reduction="sum")', 'reduction="mean")', LOSS),
    Bug("any head believed", "training/loss.py",
        "if logits.shape == expected.shape and (logits - expected).abs().max() <= tolerance *"
        " expected.abs().max():",
        "if logits.shape == expected.shape:", LOSS),
    Bug("a trained head taken for a frozen one", "training/loss.py",
        " and not any(p.requires_grad for p in layer.parameters())", "", LOSS),
    # Attention over packed rows.
    Bug("attention crosses rows", "training/causal.py", "slice(max(start, first", "slice(max(0, first", ATTENTION),
    Bug("window one too long", "training/causal.py", "(j <= i - rule.window)", "(j < i - rule.window)", ATTENTION),
    Bug("attention sees the future", "training/causal.py", "hidden = j > i if", "hidden = j > i + 1 if", ATTENTION),
    Bug("attention's soft cap ignored", "training/causal.py", "s = bend.mul_(rule.cap)", "s = bend", ATTENTION),
    Bug("the slope of the cap forgotten", "training/causal.py", "s if slope is None else s.mul_(slope)", "s",
        ATTENTION),
    Bug("dropout drops other weights in the backward pass", "training/causal.py", "rule.seed + self.queries.start",
        "rule.seed + torch.seed() % 2**20", ATTENTION),
    Bug("a block's keys overwrite another's gradient", "training/causal.py", "grad_k[:, block.keys] +=",
        "grad_k[:, block.keys] =", ATTENTION),
    Bug("the model's own scaling ignored", "training/attention.py",
        "query.shape[-1] ** -0.5 if scaling is None else scaling", "query.shape[-1] ** -0.5", ATTENTION),
    Bug("unknown keywords of attention passed over", "training/attention.py", "if asked or attention_mask is not None",
        "if attention_mask is not None", ATTENTION),
    Bug("attention's dropout in evaluation", "training/attention.py", "dropout if module.training else 0.0", "dropout",
        ATTENTION),
    Bug("the user's attention not given back", "training/attention.py",
        "        _lengths = None\n        model.set_attn_implementation(before)",
        "        _lengths = None\n        (before)", ATTENTION),
    Bug("varlen without the window", "training/attention.py", "back = -1 if rule.window is None else",
        "back = -1 if True else", ATTENTION),
    # Batches.
    Bug("labels shifted by one", "data/batches.py", "(start + p - 1, label)", "(start + p, label)", BATCHES),
    Bug("a row's first token predicted by its neighbour", "data/batches.py", "if label != IGNORE and p > 0",
        "if label != IGNORE and start + p > 0", BATCHES),
    Bug("loss on what carries none", "data/batches.py", "if label != IGNORE and p > 0", "if p > 0", BATCHES),
    Bug("positions do not restart", "data/batches.py", "torch.cat(ids)[None], torch.cat(positions)[None]",
        "torch.cat(ids)[None], torch.arange(sum(lengths))[None]", BATCHES),
    Bug("padded on the left", "data/batches.py", "pad_sequence(ids, batch_first=True)",
        'pad_sequence(ids, batch_first=True, padding_side="left")', BATCHES),
    Bug("the rows of an epoch's last, smaller step dropped", "data/batches.py",
        "return math.ceil(len(self.examples) / (self.batch_size * self.accumulate))",
        "return max(1, len(self.examples) // (self.batch_size * self.accumulate))", BATCHES),
    Bug("the same order every epoch", "data/batches.py", "self.seed * 1_000_003 + epoch", "self.seed * 1_000_003",
        BATCHES),
    Bug("the seed of the order ignored", "data/batches.py", "self.seed * 1_000_003 + epoch", "epoch", BATCHES),
    Bug("accumulation forgotten in a step's rows", "data/batches.py",
        "        per_step = self.batch_size * self.accumulate\n", "        per_step = self.batch_size\n", BATCHES),
    Bug("a pass one row over its limit", "data/batches.py", "for other in (*parts[-1], row)]",
        "for other in (parts[-1] or [row])]", BATCHES),
    # The schedule.
    Bug("learning rate a step late", "training/optim.py", "config.lr * (step + 1) / warmup",
        "config.lr * step / warmup", OPTIM),
    Bug("warm-up as steps where it is a share", "training/optim.py",
        "round(config.warmup * steps) if config.warmup < 1 else ", "", OPTIM),
    Bug("cosine over the whole run, warm-up included", "training/optim.py", "(step - warmup) / max(1, steps - warmup)",
        "step / max(1, steps)", OPTIM),
    Bug("weight decay always on", "training/optim.py", "weight_decay=config.weight_decay", "weight_decay=0.01", LOOP),
    Bug("betas ignored", "training/optim.py", "betas=config.betas", "betas=(0.9, 0.95)", LOOP + OPTIM),
    Bug("modules not put back into training mode", "training/modes.py", "module.training = True", "pass", LOOP),
    Bug("looked at with dropout", "training/modes.py", "module.training = False", "pass", LOOP),
    # Chat.
    Bug("end of turn not supervised", "data/chat.py", "if not self._closed(text, stop):", "if False:", CHAT),
    Bug("the prompt supervised", "data/chat.py", '(context if loss_on == "all" else [IGNORE] * len(context)) + answer',
        "context + answer", CHAT),
    Bug("generation prompt supervised", "data/chat.py", "starts = [len(prompt) for prompt in prompts]",
        "starts = [len(self.render(views[:k], given)) for k in turns]", CHAT),
    Bug("BOS twice", "data/chat.py", "if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:", "if False:",
        CHAT),
    Bug("text without its EOS", "data/chat.py", "ids = _beginning(text, tokenizer) + _end(tokenizer)",
        "ids = _beginning(text, tokenizer)", CHAT),
    Bug("a message can forge a turn", "data/chat.py", "lambda text: self._control.broken(text, role))",
        "lambda text: text)", CHAT),
    Bug("control tokens broken once, not until none is left", "data/control.py",
        "        while (broken := self._patterns[role].sub(lambda match: match[0][0] + BREAK +"
        " match[0][1:], text)) != text:\n"
        "            text = broken\n",
        "        text = self._patterns[role].sub(lambda match: match[0][0] + BREAK + match[0][1:], text)\n", CHAT),
    Bug("a look-alike normalised into a control token", "data/control.py", "if self._normalised and any(",
        "if False and any(", (*CHAT, "data/test_templates.py")),
    Bug("an end joins with the template into a control token", "data/chat.py",
        "map_strings(views, self._control.apart)", "views", (*CHAT, "data/test_templates.py")),
    Bug("only the last answer supervised", "data/chat.py", 'turns if loss_on == "assistant" else turns[-1:]',
        "turns[-1:]", CHAT),
    Bug("today's date in the rows", "data/chat.py", "(self.text, DATE)", "(self.text, datetime.now())",
        (*CHAT, "data/test_templates.py")),
    # Generation.
    Bug("padded on the right", "model/generate.py", "ids = torch.tensor([[0] * (width - len(p)) + list(p)",
        "ids = torch.tensor([list(p) + [0] * (width - len(p))", GENERATE),
    Bug("temperature ignored", "model/generate.py", "(logits.double() / temperature)", "logits.double()", GENERATE),
    Bug("top_p one token short", "model/generate.py", "probabilities.cumsum(-1) - probabilities >= top_p",
        "probabilities.cumsum(-1) >= top_p", GENERATE),
    Bug("top_k ignored", "model/generate.py", "scores[: top_k or None]", "scores[:]", GENERATE),
    Bug("the seed of the draw ignored", "model/generate.py", "if seed is None else seed)\n\n    def draw",
        "if seed is None else 0)\n\n    def draw", GENERATE),
    Bug("one generator for all rows", "model/generate.py", "None if seed is None else seed + i)", "seed)", GENERATE),
    Bug("half a character handed out", "model/generate.py", 'if not piece or piece.endswith("\\ufffd") else',
        "if not piece else", GENERATE),
    Bug("the start of a stop string handed out", "model/generate.py",
        "self.held = text[len(text) - keep :]\n        return text[: len(text) - keep]", "return text", GENERATE),
    # The loop.
    Bug("a mean of means over the passes of a step", "training/loop.py",
        "run.passes.loss(run.model, batch.to(device), max(tokens, 1))",
        "run.passes.loss(run.model, batch.to(device), max(batch.targets.numel(), 1) * len(window))", LOOP),
    Bug("dropout's seed ignored", "training/loop.py", "hash((run.config.seed, run.step, number))",
        "hash((run.step, number))", LOOP),
    Bug("the same dropout at every step", "training/loop.py", "hash((run.config.seed, run.step, number))",
        "hash((run.config.seed, number))", LOOP),
    Bug("the same dropout in every pass of a step", "training/loop.py", "hash((run.config.seed, run.step, number))",
        "hash((run.config.seed, run.step))", LOOP),
    Bug("dropout drawn from what came before", "training/loop.py",
        "        torch.manual_seed(hash((run.config.seed, run.step, number)) % 2**63)",
        "        hash((run.config.seed, run.step, number))", LOOP),
    Bug("clipped before all passes are in", "training/loop.py", "        total += loss.detach().cpu()\n",
        "        total += loss.detach().cpu()\n        _clip(run.optimizer, run.config.max_grad_norm)\n", LOOP),
    Bug("not clipped", "training/loop.py", "math.inf if limit is None else limit", "math.inf", LOOP),
    Bug("a step with NaN is taken", "training/loop.py", "    if not finite:\n        _refuse",
        "    if False:\n        _refuse", LOOP),
    Bug("bad steps counted over the whole run", "training/loop.py", "        run.bad = 0\n", "", NUMBERS),
    Bug("a step without supervised tokens moves the weights", "training/loop.py", "    elif tokens:", "    else:",
        LOOP),
    Bug("the schedule's rate not used", "training/loop.py", '            group["lr"] = lr\n', "            pass\n",
        LOOP),
    Bug("gradients pile up over the steps", "training/loop.py", "    run.optimizer.zero_grad(set_to_none=True)\n", "",
        LOOP),
    Bug("evaluation with dropout", "training/loop.py", "    with evaluating(model):\n        for step",
        "    if True:\n        for step", LOOP),
    Bug("evaluation a mean of means", "training/loop.py", "total += passes.loss(model, batch.to(device), 1).item()",
        "total += passes.loss(model, batch.to(device), 1).item() / max(batch.targets.numel(), 1)", LOSS),
    Bug("the caller's random numbers used up", "training/loop.py", "with torch.random.fork_rng(devices=devices):",
        "if True:", LOOP),
    Bug("left in training mode", "training/loop.py", "            model.eval()\n", "            pass\n", LOOP),
    Bug("the last, partial epoch dropped", "training/loop.py", "math.ceil(config.epochs", "math.floor(config.epochs",
        LOOP),
    Bug("packed whatever the model does", "training/loop.py", "batches.packing and packs_exactly(model)",
        "batches.packing", LOOP),
    Bug("evaluated a step late", "training/run.py", "(self.step + 1) % every == 0", "self.step % every == 0", LOOP),
    Bug("the best weights kept by reference", "training/run.py",
        "t.detach().cpu().clone() for name, t in self.trained()}", "t.detach() for name, t in self.trained()}", LOOP),
    Bug("the best weights not put back", "training/run.py", "if self.best.weights and", "if False and", LOOP),
    Bug("patience one too long", "training/run.py", "self.best.waited >= self.config.patience",
        "self.best.waited > self.config.patience", LOOP),
    Bug("an epoch's loss a mean of its steps", "training/run.py",
        'total[0] += record["loss"] * record["tokens"]\n                total[1] += record["tokens"]',
        'total[0] += record["loss"]\n                total[1] += 1', LOOP),
    # Exact resume.
    Bug("the optimizer's moments not restored", "training/run.py",
        "self.optimizer.state[parameter][key] = tensor.to(parameter.device)", "pass", RESUME),
    Bug("the best weights not restored", "training/run.py", "                weights[rest] = tensor\n",
        "                pass\n", RESUME),
    Bug("the records not restored", "training/run.py", 'Result(facts["history"],', "Result([],", RESUME),
    Bug("a step taken twice", "training/run.py", 'facts["step"], facts["pending"], facts["bad"]',
        'facts["step"], None, facts["bad"]', RESUME),
    Bug("weights that are not finite are saved", "training/run.py", "if not tensor.isfinite().all()]",
        "if not tensor.isfinite().any()]", NUMBERS),
    Bug("a damaged state gone on from", "training/checkpoint.py", "        if not problems:\n", "        if True:\n",
        RESUME),
    Bug("other settings gone on with", "training/checkpoint.py", "        if changed:\n", "        if False:\n",
        RESUME),
    Bug("the oldest state gone on from", "training/checkpoint.py", "self._restore(states[-1])",
        "self._restore(states[0])", RESUME),
    Bug("every state kept", "training/checkpoint.py", "[: -self.run.config.keep_checkpoints]", "[:0]", RESUME),
    Bug("labels no part of what rows are", "training/checkpoint.py", "*row.ids, *row.labels", "*row.ids", RESUME),
    Bug("gradients of a step that was cut off are kept", "training/checkpoint.py",
        "            self.run.optimizer.zero_grad(set_to_none=True)", "            pass", RESUME),
    Bug("an unfinished run begun anew", "training/checkpoint.py", "if not resume and state_folders(self.folder):",
        "if False:", RESUME),
    # Writing.
    Bug("a file not forced to disk", "files.py", "        _write_all(handle, data)\n        SYSTEM.fsync(handle)\n",
        "        _write_all(handle, data)\n", FILES),
    Bug("a new name not forced to disk", "files.py", "    _sync(target.parent)\n\n\ndef _remove", "\n\ndef _remove",
        FILES),
    Bug("sealed after it is in place", "files.py",
        "            _seal(temporary, about or {})\n            _move(temporary, target)\n",
        "            _move(temporary, target)\n            _seal(target, about or {})\n", FILES),
    Bug("the old folder deleted first", "files.py", "        SYSTEM.exchange(source, target)",
        "        _remove(target)\n        SYSTEM.rename(source, target)", FILES),
    Bug("a file written in place", "files.py",
        "        _write(temporary, data)\n        SYSTEM.rename(temporary, target)\n", "        _write(target, data)\n",
        FILES),
    Bug("other people's files replaced", "files.py", "    if foreign:\n", "    if False:\n", FILES),
    Bug("modes as safetensors leaves them", "files.py",
        "        SYSTEM.chmod(path, (0o777 if path.is_dir() else 0o666) & ~umask)\n", "", FILES),
    Bug("what others are writing swept away", "files.py", "            if hold(handle):\n", "            if True:\n",
        FILES),
    Bug("a flipped bit not seen", "files.py", 'elif _sha256(file) != entry.get("sha256"):', "elif False:", FILES),
    Bug("a changed manifest believed", "files.py", "return manifest if raw == _json(_sealed(unsealed)) else None",
        "return manifest", FILES),
    Bug("a short write taken for a whole one", "files.py", "rest = rest[SYSTEM.write(handle, rest) :]",
        "SYSTEM.write(handle, rest)\n        return", FILES),
    Bug("half a line of the log left", "files.py", "                SYSTEM.truncate(handle, size)\n", "", FILES),
    Bug("two runs hold one folder", "locks.py", "LOCK_EX | fcntl.LOCK_NB", "LOCK_SH | fcntl.LOCK_NB", LOCKS),
    Bug("a run on another machine is not asked after", "locks.py",
        "    return f\"process {owner.get('pid')} on {owner.get('host')} (if that run is gone, remove {file})\"",
        "    return None", LOCKS),
    # Adapters.
    Bug("another prefix than PEFT's", "adapter/peft_format.py", 'PREFIX = "base_model.model."',
        'PREFIX = "base_model."', PEFT),
    Bug("tensors that nobody expects accepted", "adapter/peft_format.py",
        '"unexpected": sorted(entries.keys() - needed.keys() - copies.keys())', '"unexpected": []', PEFT),
    Bug("shapes unchecked", "adapter/peft_format.py", "if entries[name].shape != needed[name].shape", "if False", PEFT),
    Bug("an adapter with NaN saved", "adapter/peft_format.py", "if not tensor.isfinite().all()]:", "if False]:", PEFT),
    Bug("an adapter with NaN loaded", "adapter/peft_format.py", "if not _finite(tensors[name], needed[name].dtype)]",
        "if False]", PEFT),
    Bug("two tensors for one place", "adapter/peft_format.py", "if counts[name] > 1]:", "if False]:", PEFT),
    Bug("merged twice", "adapter/peft_format.py", "    if merged and adapter_digest(tensors) in merged:",
        "    if False:", IDENTITY),
    Bug("loaded onto another base", "adapter/peft_format.py", "    if difference and not force_base:", "    if False:",
        IDENTITY),
    Bug("the base's weights of another model believed", "adapter/peft_format.py",
        "if not _repeats(copies[n], file, entries[n])]", "if False]", PEFT),
    Bug("weights and configuration of two saves", "adapter/peft_format.py", 'if note.get("config") != meaning(plan):',
        "if False:", PEFT),
    Bug("a damaged adapter loaded", "adapter/peft_format.py", "broken = damaged(folder, [WEIGHTS])", "broken = []",
        PEFT),
    Bug("loading uses up random numbers", "adapter/peft_format.py", "with torch.random.fork_rng(devices=[]):",
        "if True:", PEFT),
    Bug("trained although it should not be", "adapter/peft_format.py", "value.requires_grad_(trainable)",
        "value.requires_grad_(True)", PEFT),
    Bug("bytes hidden between tensors", "adapter/weights_file.py", "if entry.begin != place:",
        "if entry.begin < place:", HEADER),
    Bug("bytes hidden behind the tensors", "adapter/weights_file.py", "if place != size:", "if place > size:", HEADER),
    Bug("a header without a limit", "adapter/weights_file.py", "if length > LONGEST_HEADER:", "if False:", HEADER),
    Bug("a tensor read from the header", "adapter/weights_file.py", "self.handle.seek(self.start + entry.begin)",
        "self.handle.seek(entry.begin)", HEADER),
    Bug("size and shape not compared", "adapter/weights_file.py",
        "if entry.end - entry.begin != math.prod(shape) * entry.dtype.itemsize:", "if False:", HEADER),
    Bug("a key given twice, the last one wins", "adapter/untrusted.py", "        if key in found:\n",
        "        if False:\n", HEADER + SCHEMA),
    Bug("unknown fields passed over", "adapter/peft_config.py", 'it may change the result" if value else None',
        'it may change the result" if False else None', SCHEMA),
    Bug("fields that change the result passed over", "adapter/peft_config.py",
        "refused = value and value != UNSUPPORTED[name]", "refused = False", SCHEMA),
    Bug("values out of range accepted", "adapter/peft_config.py", "if not KINDS[name].fits(value) and", "if False and",
        SCHEMA),
    Bug("an init that changed the base", "adapter/peft_config.py",
        'if name == "init_lora_weights" and value not in PLAIN_INITS:', "if False:", SCHEMA + PEFT),
    Bug("a pattern may take its time", "adapter/peft_config.py", "if first < 0 or time.thread_time() > end:",
        "if first < 0:", SCHEMA),
    Bug("rsLoRA forgotten when loading", "adapter/peft_config.py", 'rslora=raw["use_rslora"]', "rslora=False",
        ("test_properties.py",)),
    Bug("dropout forgotten when saving", "adapter/peft_config.py", '"lora_dropout": config.dropout',
        '"lora_dropout": 0.0', ("test_properties.py",)),
    Bug("a pattern's other layers with PEFT's default rank", "adapter/peft_config.py",
        'raw["rank_pattern"], names, raw["r"])', 'raw["rank_pattern"], names, 8)', PEFT),
    Bug("another architecture taken for the same base", "adapter/fingerprint.py",
        "if name in ours and not _same(fact, ours[name]):", "if False:", IDENTITY),
    Bug("other values taken for the same base", "adapter/fingerprint.py",
        "if not torch.isclose(now, was, rtol=RELATIVE, atol=ABSOLUTE, equal_nan=True).all():", "if False:", IDENTITY),
    Bug("an adapter's names no part of what it is", "lora/identity.py",
        'found.update(f"{name} {tuple(values.shape)}\\n".encode())', 'found.update(b"")', IDENTITY),
)  # fmt: skip
COUNT = LONG = len(BUGS)


def planted(case: int) -> tuple[str, str]:
    """The path, and the text of the file with bug `case` in it. LookupError when the bug has gone stale."""
    bug = BUGS[case]
    path = f"src/lorafit/{bug.file}"
    text = (ROOT / path).read_text(encoding="utf-8")
    if (times := text.count(bug.old)) != 1:
        raise LookupError(f"bug {case} ({bug.name}) is stale: {bug.old!r} stands {times} times in {path}, not once")
    changed = text.replace(bug.old, bug.new)
    compile(changed, path, "exec")
    return path, changed


def run(case: int, folder: Path) -> str | None:
    try:
        path, text = planted(case)
    except (LookupError, SyntaxError) as error:
        return str(error)
    tests = [f"tests/{name}" for name in BUGS[case].tests]
    for test in tests:
        check_untouched(test)
    if suite_fails(folder, tests, {path: text}):
        return None
    bug = BUGS[case]
    return f"bug {case} ({bug.name}: {bug.old!r} -> {bug.new!r} in {path}) is not found by {', '.join(tests)}"
