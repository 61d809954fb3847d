"""Converters on rows of each real schema, spelt out beside their source; files fetched from folders laid out as on the hub."""

import json
import os
import subprocess
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, run_well, write_model
from tokenizers import AddedToken

from chat import ChatEncoder
from data import mix, tokenise
from hub import CONTROL_TOKENS, PAIRS, SOURCES, HubError, clean, fetch, find_threads, parse_weight, repository_of, select_shp
from make_tiny import make_rows, train_tokenizer
from model_utils import load_tokenizer
from rows import list_files, to_conversation, to_pair


def talk(*texts: str) -> list[dict]:
    """Question, answer, question, …"""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


# ---------------------------------------------------------------------------------------------------------------------
# Rows as they are on the hub: every column of the schema, and where that was read


def ultrachat(*texts):
    """Columns: card of HuggingFaceH4/ultrachat_200k at ca063fb; splits train_sft, test_sft, …: its viewer."""
    return {"prompt": texts[0], "prompt_id": "f0e37e9f", "messages": talk(*texts)}


def ultrabin(question, better, worse):
    """Card of HuggingFaceH4/ultrafeedback_binarized, main: splits train_prefs, test_prefs, …"""
    return {"prompt": question, "prompt_id": "bf3b", "chosen": talk(question, better), "rejected": talk(question, worse),
            "messages": talk(question, better), "score_chosen": 8.5, "score_rejected": 4.0}


def oasst(name, parent, role, rank, lang="en"):
    """Card of OpenAssistant/oasst1 at 670f5bc: one message a row, the best of ranked siblings has rank 0; train, validation."""
    toxicity = dict.fromkeys(("toxicity", "severe_toxicity", "obscene", "identity_attack", "insult", "threat",
                              "sexual_explicit"), 0.01)
    return {"message_id": name, "parent_id": parent, "user_id": "u", "created_date": "2023-02-05T14:23:50.983374+00:00",
            "text": f"text of {name}", "role": role, "lang": lang, "review_count": 3, "review_result": True, "deleted": False,
            "rank": rank, "synthetic": False, "model_name": None, "detoxify": toxicity, "message_tree_id": "t",
            "tree_state": "ready_for_export", "emojis": {"name": ["+1"], "count": [1]},
            "labels": {"name": ["spam"], "value": [0.0], "count": [3]}}


def shp(post, a, b, score_a, score_b):
    """Columns: card of JayHyeon/SHP_test, a copy; card of stanfordnlp/SHP at acbac73: labels is 1 if A is preferred; one
    folder a subreddit with train.json, validation.json and test.json."""
    return {"post_id": post, "domain": "askculinary_train", "upvote_ratio": 0.98, "history": f"history of {post}",
            "c_root_id_A": a, "c_root_id_B": b, "created_at_utc_A": 1636822112, "created_at_utc_B": 1636822110,
            "score_A": score_a, "score_B": score_b, "human_ref_A": a, "human_ref_B": b, "labels": int(score_a > score_b),
            "seconds_difference": 2.0, "score_ratio": max(score_a, score_b) / min(score_a, score_b)}


def hh(better, worse):
    """Card of Anthropic/hh-rlhf at 441a767: folders helpful-base, harmless-base, … with train.jsonl.gz and test.jsonl.gz."""
    return {"chosen": better, "rejected": worse}


def safe_rlhf(question, first, second, better):
    """Columns as asserted on 2026-07-19 by the ARCHITECTURE document of `reward-concentration` (GitHub); files
    data/Alpaca-7B/{train,test}.jsonl, …: card of PKU-Alignment/PKU-SafeRLHF-single-dimension at 8774167."""
    return {"prompt": question, "response_0": first, "response_1": second, "prompt_source": "s", "response_0_source": "Alpaca-7B",
            "response_1_source": "Alpaca-7B", "better_response_id": better, "response_0_sha256": "0", "response_1_sha256": "1"}


def s1k(question, thought, answer):
    """Columns: cards of skytliang/s1K-1.1 and voidful/zh-s1K-1.1, copies of simplescaling/s1K-1.1; data/train-*.parquet."""
    return {"solution": "4", "question": question, "cot_type": "math", "source_type": "s", "metadata": "{}",
            "gemini_thinking_trajectory": "?", "gemini_attempt": "?", "deepseek_thinking_trajectory": thought,
            "deepseek_attempt": answer}


def alpacaeval(question, answer):
    """alpaca_eval.py of tatsu-lab/alpaca_eval at e415d65: these features of alpaca_eval.json, a list in that repository."""
    return {"instruction": question, "output": answer, "generator": "text_davinci_003", "dataset": "helpful_base"}


def wildbench(answer, *texts):
    """Card of allenai/WildBench at 9fce559: configuration v2, split test."""
    told = [{**turn, "language": "English", "redacted": False, "toxic": False} for turn in talk(*texts)]
    return {"id": 1, "session_id": "s", "conversation_input": told, "references": {"gpt-4": answer}, "checklist": ["ok?"],
            "length": 10, "primary_tag": "Coding", "secondary_tags": ["Math"], "intent": "i", "appropriate": "yes"}


TREE = [oasst("q", None, "prompter", None), oasst("good", "q", "assistant", 0), oasst("bad", "q", "assistant", 2),
        oasst("fair", "q", "assistant", 1), oasst("thanks", "good", "prompter", 0), oasst("why", "good", "prompter", 1),
        oasst("lone", "thanks", "assistant", None),
        oasst("deep bad", "why", "assistant", 1), oasst("deep good", "why", "assistant", 0),
        oasst("que", None, "prompter", None, "es"), oasst("lost good", "que", "assistant", 0),
        oasst("lost bad", "que", "assistant", 1)]

HH = hh("\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Why?\n\nSo?\n\nAssistant: Because.",
        "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Why?\n\nSo?\n\nAssistant: No.")


# ---------------------------------------------------------------------------------------------------------------------
# Converters

CONVERTED = {
    "ultrachat": (ultrachat("a", "b", "c", "d"), [talk("a", "b", "c", "d")]),
    "ultrabin": (ultrabin("q", "yes", "no"), [talk("q", "yes"), talk("q", "no")]),
    "shp, A is preferred": (shp("p", "x", "y", 8, 2), [talk("history of p", "x"), talk("history of p", "y")]),
    "shp, B is preferred": (shp("p", "x", "y", 2, 8), [talk("history of p", "y"), talk("history of p", "x")]),
    "hh": (HH, [talk("Hi", "Hello.", "Why?\n\nSo?", "Because."), talk("Hi", "Hello.", "Why?\n\nSo?", "No.")]),
    "safe_rlhf, 0 is better": (safe_rlhf("q", "x", "y", 0), [talk("q", "x"), talk("q", "y")]),
    "safe_rlhf, 1 is better": (safe_rlhf("q", "x", "y", 1), [talk("q", "y"), talk("q", "x")]),
    "s1k": (s1k("2+2?", "Let me see.\n", "4"), [talk("2+2?", "<think>\nLet me see.\n</think>\n\n4")]),
    "alpacaeval": (alpacaeval("q", "a"), [talk("q", "a")]),
    "wildbench": (wildbench("z", "a", "b", "c"), [talk("a", "b", "c", "z")]),
}


@pytest.mark.parametrize("case", CONVERTED)
def test_a_row_becomes_conversations(case):
    row, conversations = CONVERTED[case]
    before = json.dumps(row)
    assert SOURCES[case.partition(",")[0]].convert(row) == conversations
    assert json.dumps(row) == before


def test_oasst_gives_the_best_and_the_worst_reply_to_each_question_in_english():
    converted = [SOURCES["oasst"].convert(row) for row in find_threads(TREE, "train")]
    first = [talk("text of q", "text of good"), talk("text of q", "text of bad")]
    deep = [talk("text of q", "text of good", "text of why", f"text of deep {reply}") for reply in ("good", "bad")]
    assert converted[:2] == [first, deep]
    assert [clean(conversation, True, "") for conversation in converted[2]] == [[], []]  # the question is in Spanish
    assert len(converted) == 3


def test_shp_trains_on_pairs_with_twice_the_score_and_on_five_of_a_post():
    rows = [shp("few", "a", "b", 4, 2), shp("few", "a", "c", 3, 2), shp("few", "d", "a", 2, 5)]
    many = [shp("many", f"m{i}", "n", 10 + i, 5) for i in range(9)]
    kept = list(select_shp(rows + many, "train"))
    assert [row["c_root_id_B"] for row in kept if row["post_id"] == "few"] == ["b", "a"]
    assert len([row for row in kept if row["post_id"] == "many"]) == 5
    assert kept == list(select_shp(rows + many, "train")) == sorted(kept, key=(rows + many).index)
    assert list(select_shp(rows + many, "test")) == rows + many


SYSTEM = {"role": "system", "content": "s"}
CLEANED = {
    "questions after the last answer": (talk("a", "b", "c"), talk("a", "b")),
    "a system message": ([SYSTEM, *talk("a", "b")], [SYSTEM, *talk("a", "b")]),
    "nothing": ([], []),
    "a system message alone": ([SYSTEM], []),
    "no answer": (talk("a"), []),
    "an answer first": (talk("a", "b")[1:], []),
    "two questions": (talk("a")[:1] + talk("a", "b"), []),
    "two answers": (talk("a", "b") + talk("a", "b")[1:], []),
    "an unknown role": ([{"role": "tool", "content": "t"}, *talk("a", "b")], []),
    "an empty answer": (talk("a", " \n"), []),
    "a null": ([{"role": "user", "content": None}, *talk("a", "b")[1:]], []),
}


@pytest.mark.parametrize("case", CLEANED)
def test_conversations_that_chat_py_would_refuse_are_dropped(case):
    messages, expected = CLEANED[case]
    cleaned = clean(messages, False, "")
    assert cleaned == expected
    if cleaned:
        read = to_conversation({"messages": cleaned}).messages
        assert [message["content"] for message in read] == [message["content"] for message in expected]


def test_control_tokens_begin_the_answers_that_are_trained():
    conversation = talk("a", "b", "c", "d")
    all_trained, last_trained = clean(conversation, False, "<|good|>"), clean(conversation, True, "<|bad|>")
    assert all_trained == talk("a", "<|good|>b", "c", "<|good|>d")
    assert last_trained == [*talk("a"), {**talk("a", "b")[1], "train": False}, *talk("c", "<|bad|>d")]


def test_a_control_token_is_one_target_right_after_the_generation_prompt(tmp_path):
    train_tokenizer(make_rows(200, 1)[0], tmp_path)
    tokenizer = load_tokenizer(str(tmp_path), str(tmp_path))
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in CONTROL_TOKENS])
    encoder = ChatEncoder(tokenizer, 128, 64)
    for token in CONTROL_TOKENS:
        messages = clean(talk("add 1 and 2", "3", "add 2 and 3", "5"), True, token)
        columns, counts, _ = encoder.encode_rows(0, Path("x.jsonl"), 0, [(1, {"messages": messages})])
        targets = columns["ids"][columns["trained"]].tolist()
        prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
        assert columns["ids"][:columns["trained"].argmax()].tolist() == prompt
        assert targets[0] == tokenizer.convert_tokens_to_ids(token) != tokenizer.unk_token_id
        assert tokenizer.decode(targets[1:-1]).strip() == "5" and counts["targets"] == len(targets)


# ---------------------------------------------------------------------------------------------------------------------
# Fetching: from folders laid out as the repositories are


def write_parquet(file: Path, rows: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pytest.importorskip("datasets").Dataset.from_list(rows).to_parquet(file)


def write_json(file: Path, rows: list[dict], lines: bool = True) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) if lines else json.dumps(rows))


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A folder that stands for the hub; what `datasets` keeps beside it goes to another."""
    datasets = pytest.importorskip("datasets")
    root = tmp_path_factory.mktemp("hub")
    write_parquet(root / "HuggingFaceH4/ultrachat_200k/data/train_sft-00000-of-00001.parquet",
                  [ultrachat("a", "b", "c"), ultrachat("d", "e", "f", "g"), ultrachat("h")])
    write_parquet(root / "HuggingFaceH4/ultrachat_200k/data/test_sft-00000-of-00001.parquet", [ultrachat("test", "b")])
    write_parquet(root / "HuggingFaceH4/ultrachat_200k/data/train_gen-00000-of-00001.parquet", [ultrachat("gen", "b")])
    for split in ("train", "test"):
        write_parquet(root / f"HuggingFaceH4/ultrafeedback_binarized/data/{split}_prefs-00000-of-00001.parquet",
                      [ultrabin(split, "yes", "no"), ultrabin(split, "yes", "never"), ultrabin("q", "", "no")])
        write_json(root / f"stanfordnlp/SHP/askculinary/{split}.json", [shp(split, "x", "y", 8, 2), shp(split, "x", "z", 3, 2)])
        for kind in ("helpful-base", "harmless-base"):
            write_json(root / f"Anthropic/hh-rlhf/{kind}/{split}.jsonl", [
                hh(f"\n\nHuman: {kind} {split}\n\nAssistant: Yes.", f"\n\nHuman: {kind} {split}\n\nAssistant: No.")])
        write_json(root / f"PKU-Alignment/PKU-SafeRLHF-single-dimension/data/Alpaca-7B/{split}.jsonl",
                   [safe_rlhf(split, "x", "y", 1)])
    for split in ("train", "validation"):
        write_parquet(root / f"OpenAssistant/oasst1/data/{split}-00000-of-00001.parquet", TREE)
    write_parquet(root / "simplescaling/s1K-1.1/data/train-00000-of-00001.parquet", [s1k("2+2?", "Hm.", "4")])
    write_json(root / "tatsu-lab/alpaca_eval/alpaca_eval.json", [alpacaeval("q", "a")], lines=False)
    (root / "tatsu-lab/alpaca_eval/alpaca_eval.py").write_text("raise SystemExit('it is not to be run')")
    for version in ("v1", "v2"):
        write_parquet(root / f"allenai/WildBench/{version}/test-00000-of-00001.parquet", [wildbench(version, "a", "b", "c")])
    (root / "allenai/WildBench/README.md").write_text(
        "---\nconfigs:\n- config_name: v1-legacy\n  data_files:\n  - split: test\n    path: v1/test-*\n"
        "- config_name: v2\n  data_files:\n  - split: test\n    path: v2/test-*\n---\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("arrow")))
        yield str(root)


def read(path: str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_bytes().splitlines()]


def untrained(messages: list[dict]) -> list[dict]:
    """All answers but the last taken out of the loss."""
    *before, last = messages
    return [message | ({"train": False} if message["role"] == "assistant" else {}) for message in before] + [last]


FETCHED = {
    ("ultrachat", "train"): [talk("a", "b"), talk("d", "e", "f", "g")],
    ("ultrachat", "test"): [talk("test", "b")],
    ("ultrabin", "train"): [talk("train", "yes")],
    ("ultrabin", "test"): [talk("test", "yes")],
    ("oasst", "train"): [talk("text of q", "text of good"),
                         untrained(talk("text of q", "text of good", "text of why", "text of deep good"))],
    ("shp", "train"): [talk("history of train", "x")],
    ("hh", "train"): [talk("harmless-base train", "Yes."), talk("helpful-base train", "Yes.")],
    ("hh_helpful", "train"): [talk("helpful-base train", "Yes.")],
    ("hh_harmless", "test"): [talk("harmless-base test", "Yes.")],
    ("safe_rlhf", "test"): [talk("test", "y")],
    ("s1k", "train"): [talk("2+2?", "<think>\nHm.\n</think>\n\n4")],
    ("alpacaeval", "test"): [talk("q", "a")],
    ("wildbench", "test"): [untrained(talk("a", "b", "c", "v2"))],
}


@pytest.mark.parametrize("name, split", FETCHED)
def test_a_data_set_is_fetched_by_name(hub, tmp_path, name, split):
    path = fetch(name, split, str(tmp_path), root=hub)
    assert path == str(tmp_path / "datasets" / f"{name}-{split}.jsonl")
    rows = read(path)
    assert [row["messages"] for row in rows] == FETCHED[name, split]
    assert [len(to_conversation(row).messages) for row in rows] == [len(messages) for messages in FETCHED[name, split]]


def test_every_data_set_of_the_table_is_among_those_fetched_here():
    assert set(SOURCES) == {name for name, _ in FETCHED}


def test_the_dropped_rows_are_counted(hub, tmp_path, capsys):
    fetch("ultrabin", "train", str(tmp_path), root=hub)
    assert capsys.readouterr().out == ("ultrabin, train: 1 rows of HuggingFaceH4/ultrafeedback_binarized; dropped: 1 that are no "
                                       "exchange of questions and answers, 1 repeated\n")


def test_conditional_sft_gives_a_good_and_a_bad_row(hub, tmp_path):
    path = fetch("ultrabin", "train", str(tmp_path), form="conditional", root=hub)
    rows = [row["messages"] for row in read(path)]
    assert rows == [talk("train", "<|good|>yes"), talk("train", "<|bad|>no"), talk("train", "<|bad|>never"),
                    talk("q", "<|bad|>no")]
    assert path != fetch("ultrabin", "train", str(tmp_path), root=hub)
    rows = [row["messages"] for row in read(fetch("oasst", "test", str(tmp_path), form="conditional", root=hub))]
    assert rows[:2] == [talk("text of q", "<|good|>text of good"), talk("text of q", "<|bad|>text of bad")]
    rows = read(fetch("ultrachat", "train", str(tmp_path), form="conditional", root=hub))
    assert rows[1]["messages"] == talk("d", "<|good|>e", "f", "<|good|>g")


def test_any_data_set_of_the_hub_is_written_as_it_is(hub, tmp_path):
    rows = [{"prompt": "q", "completion": "a\u2028ü"}, {"messages": untrained(talk("a", "b", "c", "d"))}]
    columns = dict.fromkeys(("prompt", "completion", "messages"))  # a table has all of them in each row
    for split, n_rows in (("train", 2), ("extra", 1)):
        write_parquet(tmp_path / f"some.one/set-2/data/{split}-00000-of-00001.parquet", [columns | row for row in rows[:n_rows]])
    path = fetch("hub:some.one/set-2", "train", str(tmp_path), root=str(tmp_path))
    extra = fetch("hub:some.one/set-2:extra", "train", str(tmp_path), root=str(tmp_path))
    with pytest.raises(HubError, match="hub:some.one/set-2:none: can't be loaded") as error:
        fetch("hub:some.one/set-2:none", "train", str(tmp_path), root=str(tmp_path))
    assert "\n" not in str(error.value)
    assert [Path(path).name, Path(extra).name] == ["some.one--set-2-train.jsonl", "some.one--set-2-extra.jsonl"]
    assert [read(path), read(extra)] == [rows, rows[:1]]
    with pytest.raises(HubError, match="must be hub:owner/name"):
        fetch("hub:set-2", "train", str(tmp_path))


def test_parquet_files_are_read_anew_when_they_change(hub, tmp_path):
    file, rows = tmp_path / "in" / "chats.parquet", [{"instruction": "q", "output": str(i)} for i in range(3)]
    write_parquet(file, rows)
    first = fetch(str(file), "train", str(tmp_path))
    assert read(first) == rows
    write_parquet(file, rows + rows)
    second = fetch(str(file), "train", str(tmp_path))
    assert read(second) == rows + rows and read(first) == rows
    write_parquet(tmp_path / "spark.parquet" / "part-0.parquet", rows[:1])
    write_parquet(tmp_path / "spark.parquet" / "part-1.parquet", rows[1:])
    assert read(fetch(str(tmp_path / "spark.parquet"), "test", str(tmp_path))) == rows
    (tmp_path / "empty.parquet").mkdir()
    for name, wrong in (("none.parquet", "no such file"), ("empty.parquet", "no .parquet file in this folder")):
        with pytest.raises(HubError, match=wrong):
            fetch(str(tmp_path / name), "train", str(tmp_path))


def test_what_is_no_parquet_file_is_said_in_one_line_and_no_pipe_is_waited_for(tmp_path, capfd):
    folder = tmp_path / "d.parquet"
    write_parquet(folder / "part-0.parquet", [{"instruction": "q", "output": "a"}])
    whole = (folder / "part-0.parquet").read_bytes()
    os.mkfifo(folder / "part-1.parquet")
    assert len(read(fetch(str(folder), "train", str(tmp_path)))) == 1
    for i, content in enumerate((b"", b"PAR1", b"no such thing", whole[:-1], whole[1:])):
        (folder / f"bad-{i}.parquet").write_bytes(content)
    with pytest.raises(HubError) as error:
        fetch(str(folder), "train", str(tmp_path))
    assert str(error.value).splitlines() == [f"{folder}/bad-{i}.parquet: not a parquet file" for i in range(5)]
    with pytest.raises(HubError, match=f"^{folder}/part-1.parquet: not a parquet file$"):
        fetch(str(folder / "part-1.parquet"), "train", str(tmp_path))
    torn = tmp_path / "torn.parquet"
    torn.write_bytes(b"PAR1" + b"x" * 20 + b"PAR1")
    capfd.readouterr()
    with pytest.raises(HubError, match=f"^{torn}: can't be loaded: .*") as error:
        fetch(str(torn), "train", str(tmp_path))
    assert "\n" not in str(error.value) and capfd.readouterr() == ("", "")  # nothing is logged beside it


def test_what_is_there_is_not_fetched_again_and_half_a_file_is(hub, tmp_path):
    partial = tmp_path / "datasets" / "s1k-train.partial"
    partial.parent.mkdir()
    partial.write_text("left by a run that was killed")
    path = Path(fetch("s1k", "train", str(tmp_path), root=hub))
    assert len(read(path)) == 1 and not partial.exists()
    path.write_text("mine\n")
    assert fetch("s1k", "train", str(tmp_path), root="/nowhere") == str(path) and path.read_text() == "mine\n"


def test_paths_come_back_and_unknown_names_do_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("shp").mkdir()
    for entry in ("shp", str(tmp_path), "missing.jsonl", "missing/folder", "./missing"):
        assert fetch(entry, "train", "cache") == entry
    for entry, nearest in (("ultrachta", "ultrachat"), ("hh-helpful", "hh_helpful"), ("alpaca_eval", "alpacaeval")):
        with pytest.raises(HubError, match=f"unknown data set '{entry}', did you mean '{nearest}'"):
            fetch(entry, "train", "cache")
    for name, split in (("alpacaeval", "train"), ("wildbench", "train"), ("s1k", "test")):
        with pytest.raises(HubError, match=f"{name} has no {split} split, only"):
            fetch(name, split, "cache")
    assert not Path("cache").exists()


def test_a_changed_schema_and_an_empty_data_set_are_one_line(hub, tmp_path):
    write_parquet(tmp_path / "simplescaling/s1K-1.1/data/train-00000-of-00001.parquet", [{"problem": "2+2?", "attempt": "4"}])
    with pytest.raises(HubError, match="s1k: row 0 of simplescaling/s1K-1.1 is not of the form .*question|trajectory"):
        fetch("s1k", "train", str(tmp_path), root=str(tmp_path))
    write_parquet(tmp_path / "HuggingFaceH4/ultrachat_200k/data/train_sft-00000-of-00001.parquet", [ultrachat("a")])
    with pytest.raises(HubError, match="ultrachat: no row of HuggingFaceH4/ultrachat_200k is left"):
        fetch("ultrachat", "train", str(tmp_path), root=str(tmp_path))
    assert {path.suffix for path in (tmp_path / "datasets").iterdir()} == {".lock"}, "no rows, nor half of them"


def run_fetch(code: str, **environment) -> subprocess.Popen:
    paths = os.pathsep.join([environment.pop("PYTHONPATH", ""), str(ROOT)]).lstrip(os.pathsep)
    return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env=os.environ | environment | {"PYTHONPATH": paths})


@pytest.mark.slow
def test_two_processes_fetch_at_once_and_one_writes(hub, tmp_path):
    code = (f"import datasets, hub, sys; print('ready', flush=True); sys.stdin.readline(); "
            f"print(hub.fetch('ultrachat', 'train', {str(tmp_path)!r}, root={hub!r}))")
    processes = [run_fetch(code, HF_HOME=str(tmp_path / "hf")) for _ in range(2)]
    assert [process.stdout.readline() for process in processes] == ["ready\n"] * 2
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    printed = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    path = tmp_path / "datasets" / "ultrachat-train.jsonl"
    assert [out.splitlines()[-1] for out, _ in printed] == [str(path)] * 2
    assert sum(out.count("ultrachat, train: 2 rows") for out, _ in printed) == 1
    assert [row["messages"] for row in read(str(path))] == FETCHED["ultrachat", "train"]


@pytest.mark.slow
def test_offline_and_not_in_the_cache_is_one_line(tmp_path):
    pytest.importorskip("datasets")
    entries = [("ultrachat", "train"), ("alpacaeval", "test"), ("hub:some/one", "train")]
    code = f"""
import hub
for entry, split in {entries}:
    try:
        hub.fetch(entry, split, {str(tmp_path)!r})
    except hub.HubError as error:
        print(error)
"""
    out, err = run_fetch(code, HF_HOME=str(tmp_path / "hf"), HF_HUB_OFFLINE="1").communicate(timeout=60)
    assert out.count("\n") == len(entries), out + err
    for (entry, _), line in zip(entries, out.splitlines()):
        assert line.startswith(f"{entry}: can't be loaded: ") and "HF_HUB_OFFLINE is set" in line


@pytest.mark.slow
def test_without_the_package_names_say_so_and_files_need_none(tmp_path):
    (tmp_path / "datasets.py").write_text("raise ImportError('blocked')")
    code = f"""
import hub
print(hub.fetch({str(tmp_path)!r}, "train", "cache"), hub.fetch("a.jsonl", "train", "cache"))
for entry in ("ultrachat", "hub:some/one", {str(tmp_path / "x.parquet")!r}):
    try:
        hub.fetch(entry, "train", {str(tmp_path)!r})
    except hub.HubError as error:
        print(error)
"""
    (tmp_path / "x.parquet").write_bytes(3 * b"PAR1")
    out, err = run_fetch(code, PYTHONPATH=str(tmp_path)).communicate(timeout=60)
    first, *errors = out.splitlines()
    assert first == f"{tmp_path} a.jsonl", err
    entries = ["ultrachat", "hub:some/one", str(tmp_path / "x.parquet")]
    assert errors == [f"{entry} needs the datasets package: pip install datasets (blocked)" for entry in entries]


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def test_weights_are_read_from_the_end_of_an_entry():
    read_as = {"gsm8k.jsonl*2": ("gsm8k.jsonl", 2.0), "shp*0.5": ("shp", 0.5), "a.jsonl": ("a.jsonl", 1.0),
               "hub:a/b:c*1e1": ("hub:a/b:c", 10.0), "a*b*3": ("a*b", 3.0)}
    assert {entry: parse_weight(entry) for entry in read_as} == read_as
    for entry in ("a*0", "a*-1", "a*", "*2", "a*nan", "a*inf", "a*1e300", "a*1001", "a*two", "a*b"):
        with pytest.raises(HubError, match="the weight after") as error:
            parse_weight(entry)
        assert repr(entry) in str(error.value) and "\n" not in str(error.value)


def test_a_path_that_is_there_is_no_weight_and_no_data_set_s_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a*b.jsonl", "a*2", "hh"):
        Path(name).write_text("")
    assert {entry: parse_weight(entry) for entry in ("a*b.jsonl", "a*b.jsonl*2", "a*2", "a*2*3", "a*3")} == {
        "a*b.jsonl": ("a*b.jsonl", 1.0), "a*b.jsonl*2": ("a*b.jsonl", 2.0), "a*2": ("a*2", 1.0), "a*2*3": ("a*2", 3.0),
        "a*3": ("a", 3.0)}
    with pytest.raises(HubError, match="^hh is a data set by name and a file here: give the file another name, hh.jsonl if it"):
        repository_of("hh", str(tmp_path))
    Path("shp").mkdir()
    assert repository_of("shp", str(tmp_path)) == ""


def test_mix_repeats_rows_by_weight():
    file_of = np.array([0] * 10 + [1] * 7 + [2] * 30 + [3] * 4, np.int32)
    ids = np.setdiff1d(np.arange(51), [3, 12])  # two rows are held out
    weights = np.array([1.0, 3.0, 0.25, 2.5])
    mixed = mix(ids, weights, file_of, seed=1)
    assert mixed.dtype == ids.dtype and (np.diff(mixed) >= 0).all()
    times = Counter(mixed.tolist())
    assert [times[row] for row in range(17)] == [0 if row == 3 else 1 for row in range(10)] + [3, 3, 0, 3, 3, 3, 3]
    assert sorted(times[row] for row in range(17, 47)) == [0] * 22 + [1] * 8  # round(7.5), halves to even
    assert sorted(times[row] for row in range(47, 51)) == [2, 2, 3, 3]
    assert (mix(ids, weights, file_of, seed=1) == mixed).all()
    assert (mix(ids, weights, file_of, seed=2) != mixed).any()
    assert (mix(ids, np.ones(4), file_of, seed=1) == ids).all()
    others = mix(ids[ids >= 10], weights, file_of, seed=1)  # a file's draw does not hang on the others
    assert (others == mixed[mixed >= 10]).all()


def test_the_random_fraction_favours_no_row():
    ids, weights, file_of = np.arange(20), np.array([0.3]), np.zeros(20, int)
    counts = sum(np.bincount(mix(ids, weights, file_of, seed), minlength=20) for seed in range(500))
    assert counts.sum() == 500 * 6 and counts.min() > 100 and counts.max() < 200  # 150 expected, standard deviation 10


def test_mixed_rows_are_those_of_the_files(tmp_path):
    """Weights of files as tokenise numbers them, down to the file of each row that is trained on."""
    train_tokenizer(make_rows(200, 1)[0], tmp_path)
    encoder = ChatEncoder(load_tokenizer(str(tmp_path), str(tmp_path)), 128, 64)
    for name, n_rows in (("a", 3), ("b", 5)):
        write_json(tmp_path / f"{name}.jsonl", [{"messages": talk(f"add {i} and 1", str(i + 1))} for i in range(n_rows)])
    paths, weights = zip(*(parse_weight(f"{tmp_path}/{entry}") for entry in ("a.jsonl*2", "b.jsonl*0.4")))
    rows = tokenise(list_files(list(paths)), encoder, str(tmp_path))
    mixed = mix(np.arange(len(rows)), np.array(weights), rows.file_of, seed=1)
    assert Counter(Path(rows.where(row).rpartition(":")[0]).name for row in mixed) == {"a.jsonl": 6, "b.jsonl": 2}


@pytest.mark.slow
def test_a_run_trains_on_the_train_splits_by_weight_and_evaluates_on_the_test_splits(hub, tmp_path):
    """Where a folder owner/name lies in the working directory, `datasets` reads it in the place of the repository."""
    write_model(tmp_path / "model")
    said = run_well(ROOT / "sft.py", "--config", ROOT / "configs/tiny.py", "datasets=[ultrachat*3]",
                    "eval_datasets=[]", "n_epochs=1", "n_eval_answers=0", f"cache_dir={tmp_path}", "model.batch_size=2",
                    f"model.tokenizer_name_or_path={tmp_path}/model", cwd=hub)
    assert "steps: 3, of 6 examples" in said and "eval: 1 of 1 held-out examples" in said
    assert (tmp_path / "tiny/FINAL/model.safetensors").is_file()


# ---------------------------------------------------------------------------------------------------------------------
# Whether the hub lets us


class Hub(BaseHTTPRequestHandler):
    """Answers auth-check as the hub does: by status and X-Error-Code."""

    ANSWERS = {"gated": (403, "GatedRepo"), "none": (401, "RepoNotFound"), "broken": (500, ""), "open": (200, "")}

    def do_GET(self):  # noqa: N802 (http.server's name)
        status, code = self.ANSWERS[self.path.split("/")[3]]
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def hub_that_answers():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def access(tmp_path, endpoint: str, offline: str = "0", *, datasets=(), **model) -> list[str]:
    """check_access in a process of its own, as huggingface_hub reads its environment once."""
    script = ("import json, sys; from configs.base import Config, ModelConfig; from hub import check_access\n"
              "kwargs = json.loads(sys.argv[1])\n"
              "print(json.dumps(check_access(Config(**kwargs | {'model': ModelConfig(**kwargs['model'])}))))\n"
              "assert 'torch' not in sys.modules and 'datasets' not in sys.modules")
    argument = json.dumps({"datasets": datasets, "cache_dir": str(tmp_path / "cache"), "model": model})
    done = subprocess.run([sys.executable, "-c", script, argument], cwd=tmp_path, capture_output=True, text=True, check=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT), "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": offline})
    return json.loads(done.stdout)


NAMES_INSTEAD = "or have it on the disk: "


@pytest.mark.parametrize("name, said", [
    ("gated/a", "gated/a: no access yet: accept its licence at https://huggingface.co/gated/a, then hf auth login; "),
    ("none/a", "none/a: no such folder, and the hub shows none of this name: see to its spelling, or hf auth login if it is "
               "private; "),
    ("broken/a", "broken/a: the hub refuses: "),
    ("/no/folder/a", "/no/folder/a: no such folder, and no name as the hub's are; ")])
def test_what_the_hub_refuses_is_said_with_what_to_do(hub_that_answers, tmp_path, name, said):
    [line] = access(tmp_path, hub_that_answers, name_or_path=name)
    assert line.startswith(said) and line.endswith(f"{NAMES_INSTEAD}model.name_or_path=FOLDER") and "\n" not in line
    data = f"hub:{name}"
    if not name.startswith("/"):
        [line] = access(tmp_path, hub_that_answers, datasets=[data, f"{data}:test*2"], name_or_path="open/a")
        assert line.startswith(said.replace("huggingface.co/", "huggingface.co/datasets/"))
        assert line.endswith(f"{NAMES_INSTEAD}datasets=[FILE]")


def test_all_that_can_t_be_had_is_said_at_once_and_what_can_be_is_not(hub_that_answers, tmp_path):
    lines = access(tmp_path, hub_that_answers, datasets=["hub:none/b", "ultrachatt", "hub:open/b", "a.jsonl"],
                   name_or_path="gated/a", tokenizer_name_or_path="open/a")
    unknown, *others = lines
    assert unknown.startswith("unknown data set 'ultrachatt', did you mean 'ultrachat'? ")
    assert [line.split(":")[0] for line in others] == ["gated/a", "none/b"]


@pytest.mark.parametrize("offline, said", [("0", "the hub can't be reached, is there a network? "),
                                           ("1", "not in the cache, and HF_HUB_OFFLINE is set; ")])
def test_without_a_network_one_line_names_all_that_is_wanted(tmp_path, offline, said):
    [line] = access(tmp_path, "http://127.0.0.1:9", offline, datasets=["ultrachat"], name_or_path="meta-llama/Meta-Llama-3-8B")
    assert line.startswith(f"meta-llama/Meta-Llama-3-8B and HuggingFaceH4/ultrachat_200k: {said}")
    assert line.endswith(f"{NAMES_INSTEAD}model.name_or_path=FOLDER datasets=[FILE]")


def test_what_is_on_the_disk_needs_no_network(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "a.jsonl").touch()
    (tmp_path / "cache/datasets").mkdir(parents=True)
    for name in ("ultrachat-train", "own--name-test"):
        (tmp_path / f"cache/datasets/{name}.jsonl").touch()
    (tmp_path / "cache/models--a--b/snapshots/0/").mkdir(parents=True)
    (tmp_path / "cache/models--a--b/snapshots/0/config.json").touch()
    (tmp_path / "cache/models--a--b/refs").mkdir()
    (tmp_path / "cache/models--a--b/refs/main").write_text("0")
    nowhere, sets = "http://127.0.0.1:9", ["a.jsonl", "ultrachat*2", "hub:own/name:test"]
    far = {"load_from": "model", "name_or_path": "a/c"}
    for name in ("model", "a/b"):
        assert access(tmp_path, nowhere, datasets=sets, name_or_path=name) == []
    assert access(tmp_path, nowhere, **far, tokenizer_name_or_path="model") == []
    assert len(access(tmp_path, nowhere, **far)) == 1  # its tokenizer


@pytest.mark.parametrize("name, split, pairs", [
    ("ultrabin", "train", [("train", "yes", "no"), ("train", "yes", "never")]), ("shp", "test", [("history of test", "x", "y"),
                                                                                                ("history of test", "x", "z")]),
    ("hh", "train", [("harmless-base train", "Yes.", "No."), ("helpful-base train", "Yes.", "No.")]),
    ("safe_rlhf", "test", [("test", "y", "x")])])
def test_pairs_are_fetched_by_name(hub, tmp_path, name, split, pairs):
    """What has an empty answer is left out whole; a good answer stays in each pair that it was compared in."""
    path = fetch(name, split, str(tmp_path), form="pairs", root=hub)
    assert path == str(tmp_path / "datasets" / f"{name}-{split}-pairs.jsonl")
    assert [(row["chosen"], row["rejected"]) for row in read(path)] == [
        (talk(question, chosen), talk(question, rejected)) for question, chosen, rejected in pairs]
    for row, (_, chosen, rejected) in zip(read(path), pairs):
        assert [conversation.messages[-1]["content"] for conversation in to_pair(row)] == [chosen, rejected]


def test_replies_of_a_thread_are_a_pair_of_the_best_and_the_worst(hub, tmp_path):
    row, *_ = read(fetch("oasst", "train", str(tmp_path), form="pairs", root=hub))
    assert [row["chosen"][-1]["content"], row["rejected"][-1]["content"]] == ["text of good", "text of bad"]


def test_a_data_set_without_rejected_answers_has_no_pairs(hub, tmp_path):
    assert {name for name in SOURCES if name in PAIRS} == {*PAIRS}
    for name in {*SOURCES} - {*PAIRS}:
        split = [*SOURCES[name].splits][0]
        with pytest.raises(HubError, match=f"{name} has no rejected answers; of the data sets by name ultrabin, oasst, shp"):
            fetch(name, split, str(tmp_path), form="pairs", root=hub)
    assert not [*tmp_path.rglob("*.jsonl")]
