"""README and docs/: what runs prints what they say, links lead somewhere; the patch of fork_it.md is DPO, and short."""

import json
import math
import re
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, run_well, write_model
from transformers import AutoModelForCausalLM

from configs.base import Config, DPOConfig, knobs, load_config
from generate import parse_arguments
from log import show_answers
from make_tiny import make_rows
from model_utils import load_tokenizer
from sft import get_lr

PAGES = sorted((ROOT / "docs").glob("*.md"))
README = (ROOT / "README.md").read_text()
every_page = pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES], ids=lambda page: page.stem)
PATCH = ROOT / "docs/dpo.patch"
BLOCK = re.compile(r"^```(python|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BORDER = "\f"


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if "```python" in page.read_text()], ids=lambda page: page.stem)
def test_a_page_prints_what_it_says(page):
    """Its python blocks, one after the other as a script from the root; each prints the text block that follows, or nothing."""
    script, expected = "", []
    for kind, content in BLOCK.findall(page.read_text()):
        if kind == "python":
            script += f"{content}\nprint({BORDER!r}, flush=True)\n"
            expected.append("")
        else:
            assert not expected[-1], f"two consecutive text blocks: {content}"
            expected[-1] = content
    *printed, rest = run_well("-c", script, cwd=ROOT, timeout=300).split(f"{BORDER}\n")
    assert printed == expected and not rest


@every_page
def test_commands_and_keys_are_known(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".cache/tiny-data").mkdir(parents=True)
    for name in ("train", "test", "pairs", "test-pairs"):
        (tmp_path / f".cache/tiny-data/{name}.jsonl").touch()
    text = page.read_text().replace("\\\n", " ")
    for n, script, line in re.findall(r"--nproc_per_node=(\d+) .*?(sft|dpo)\.py (.*)$", text, re.MULTILINE):
        argv = [argument for argument in line.partition("  #")[0].split() if page.stem != "fork_it" or argument != "beta=0.1"]
        for file in re.findall(r"[\w./-]+\.jsonl", " ".join(argv)):  # the reader's own
            (tmp_path / file).touch()
        load_config([str(ROOT / argument) if argument.startswith("configs/") else argument for argument in argv], int(n), None,
                    Config if script == "sft" else DPOConfig)
    for line in re.findall(r"^python generate\.py ([^#\n]*)", text, re.MULTILINE):
        monkeypatch.setattr(sys, "argv", ["generate.py", *line.split()])
        parse_arguments()
    for key in re.findall(r"`([a-z][\w.]*)=(?:true|false|\[)", text) + re.findall(r"`(model\.[\w.]+)[=`]", text):
        assert key in dict(knobs(DPOConfig)), key


@every_page
def test_links_lead_somewhere(page):
    """Those within the project; what follows # is a heading of that page, as GitHub makes anchors of them."""
    text = page.read_text()
    for path, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text):
        target = page.parent / path if path else page
        headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
        anchors = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
        assert not anchor or anchor in anchors, f"{path}#{anchor}"


def test_the_readme_is_short_and_leads_to_everything():
    assert len(README.splitlines()) <= 170
    for page in PAGES:
        assert f"(docs/{page.name})" in README, page
    for file in [*ROOT.glob("*.py"), ROOT / "configs/base.py"]:
        assert f"| `{file.relative_to(ROOT)}` |" in README, file


def test_the_readme_shows_what_the_tiny_run_prints():
    """The same lines as a run's summary: a question of each skill, and how many are right; not the same numbers."""
    questions = [{"prompt": row["prompt"], "expected": row["completion"], "skill": row["skill"]} for row in make_rows(0, 256)[1]]
    shown = README.split("--- held-out prompts")[1].split("\n", 1)[1].split("```")[0]
    answers = [question["expected"] for question in questions]
    _, expected = show_answers(questions, {0: [""] * 256, 1083: answers}).split("\n", 1)

    def without_numbers(text: str) -> list[str]:
        before, after = text.split("--- exactly right")
        return [*(line.split(" → ")[0] for line in before.splitlines()), *re.sub(r" +\d+$", "", after, flags=re.M).splitlines()]

    *summary, saved = without_numbers(shown)
    assert summary == without_numbers(expected) and saved.startswith("saved to .cache/tiny/FINAL; ")


def test_the_patch_is_short():
    changed = re.findall(r"^[+-](?!\+\+ |-- )", PATCH.read_text(), re.MULTILINE)
    assert len(changed) < 80
    for page in (README, (ROOT / "docs/fork_it.md").read_text()):
        assert f"DPO in {len(changed)} changed lines" in page


# ---------------------------------------------------------------------------------------------------------------------
# The fork against DPO written out in plain transformers, an answer at a time

PAIRS = [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for prompt, chosen, rejected in [
    ("reverse ABC", "CBA", "ABC"), ("sort 321", "123", "3"), ("add 2 and 3", "5", "23 23 23"), ("last letter of ABCD", "D", "A"),
    ("count A in ABA", "2", "1"), ("double each letter of XY", "XXYY", "XY")]]
BETA, LR, STEPS = 0.3, 1e-2, 3


@pytest.fixture(scope="module")
def fork(tmp_path_factory):
    """A copy of the project with the patch applied."""
    folder = tmp_path_factory.mktemp("fork") / "project"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "__pycache__"))
    subprocess.run(["git", "apply", PATCH], cwd=folder, check=True)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    write_model(folder / "model")
    return folder


@pytest.fixture(scope="module")
def expected(fork):
    """[(loss, margin, accuracy, gradient norm) of each step, and after the last]"""
    tokenizer = load_tokenizer(str(fork / "model"), ".cache")  # for its chat template
    model, reference = (AutoModelForCausalLM.from_pretrained(fork / "model") for _ in range(2))
    optimizer = torch.optim.AdamW(model.parameters(), LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)

    def logp(model, prompt: str, answer: str) -> torch.Tensor:
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        start = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(messages, tokenize=False).rstrip()  # the template ends it by eos and a new line
        before, ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (start, whole))
        logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return sum(logps[place - 1, ids[place]] for place in range(len(before), len(ids)))

    def margin(pair: dict) -> torch.Tensor:
        ratios = [logp(model, pair["prompt"], pair[key]) - logp(reference, pair["prompt"], pair[key]).detach()
                  for key in ("chosen", "rejected")]
        return BETA * (ratios[0] - ratios[1])

    records = []
    for step in range(1, STEPS + 2):
        optimizer.param_groups[0]["lr"] = get_lr(step, STEPS, 0.1, LR)
        optimizer.zero_grad()
        margins = torch.stack([margin(pair) for pair in PAIRS])
        loss = -F.logsigmoid(margins).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        records.append((loss.item(), margins.mean().item(), (margins > 0).float().mean().item(), norm.item()))
    return records


@pytest.mark.slow
@pytest.mark.parametrize("n_processes, packing", [(2, True), (0, False)], ids=["2 processes, packed", "1, padded"])
def test_the_fork_trains_by_dpo(fork, expected, n_processes, packing):
    """Every step takes all pairs, so that their order does not matter."""
    name = f"{n_processes}-{packing}"
    run_well("sft.py", "--config", "configs/llama.py", "model.name_or_path=model", "datasets=[pairs.jsonl]", f"exp_name={name}",
             "eval_datasets=[pairs.jsonl]", f"n_epochs={STEPS}", f"model.batch_size={len(PAIRS)}", f"beta={BETA}", f"lr={LR}",
             "weight_decay=0", "eval_every=1000", f"model.packing={packing}", "model.max_length=64", "model.max_prompt_length=48",
             "model.microbatch_tokens=64", "model.compile=false", n_processes=n_processes, cwd=fork)
    records = [json.loads(line) for line in (fork / ".cache" / name / "metrics.jsonl").read_text().splitlines()]
    before, *steps, after = records
    assert before["loss/eval"] == pytest.approx(math.log(2), rel=1e-6)  # the model is its own reference
    assert [step["step"] for step in steps] == [1, 2, 3] and steps[0]["loss/train"] == pytest.approx(math.log(2), rel=1e-6)
    for step, (loss, margin, accuracy, norm) in zip(steps, expected):
        assert step["grad_norm"] == pytest.approx(norm, rel=1e-3)
        assert step["loss/train"] == pytest.approx(loss, rel=1e-4)
        assert step["margin/train"] == pytest.approx(margin, rel=1e-3, abs=1e-6)
        assert step["accuracy/train"] == pytest.approx(accuracy)
    assert after["loss/eval"] == pytest.approx(expected[-1][0], rel=1e-4) and after["loss/eval"] < 0.6
