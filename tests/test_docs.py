"""README and docs/: what runs prints what they say, links lead somewhere."""

import re
import sys

import pytest
from conftest import ROOT, run_well

from configs.base import Config, DPOConfig, knobs, load_config
from generate import parse_arguments
from log import show_answers
from make_tiny import make_rows

PAGES = sorted((ROOT / "docs").glob("*.md"))
README = (ROOT / "README.md").read_text()
every_page = pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES], ids=lambda page: page.stem)
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
        argv = [argument for argument in line.partition("  #")[0].split()]
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
