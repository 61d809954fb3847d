"""Files → rows → conversations. Each expected message is written out; rows are of the shapes that public data sets have."""

import copy
import gzip
import itertools
import json
import os
import re
import socket
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rows as rows_module
from chat import ChatEncoder
from data import DataError
from hub import HubError, fetch
from make_tiny import make_rows, train_tokenizer
from model_utils import load_tokenizer
from rows import list_files, passed_over, read_rows, to_conversation, to_pair


def chat(*texts: str, system: str | None = None) -> list[dict]:
    """Question, answer, question, answer, … → messages."""
    head = [] if system is None else [{"role": "system", "content": system}]
    return head + [{"role": role, "content": text} for role, text in zip(itertools.cycle(["user", "assistant"]), texts)]


def row(*texts: str) -> dict:
    return {"messages": chat(*texts)}


def said(row: object, **options) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in to_conversation(row, **options).messages]


def refusal(row: object) -> str:
    with pytest.raises(ValueError) as raised:
        to_conversation(row)
    assert "\n" not in str(raised.value)
    return str(raised.value)


# ---------------------------------------------------------------------------------------------------------------------
# Files and folders


def test_files_and_folders(tmp_path):
    folder = tmp_path / "folder"
    (folder / "below").mkdir(parents=True)
    (folder / "old.json").mkdir()  # a folder, whatever its name
    names = ["b.jsonl", "below/a.json", "below/t.csv", "c.csv.gz", "d.json.gz", "e.jsonl.gz", "old.json/c.jsonl"]
    others = ["README.md", "below/rows.parquet", "f.gz", "g.txt.gz", "old.json/h.csv.zip"]
    for name in names + others:
        (folder / name).write_text("whatever")
    b = folder / "b.jsonl"
    assert list_files([str(b), str(folder)]) == [b, *(folder / name for name in names)]
    assert passed_over([str(b), str(folder)]) == [folder / name for name in others]
    assert list_files([str(folder / "old.json")]) == [folder / "old.json/c.jsonl"]
    assert passed_over([str(b)]) == []


@pytest.mark.parametrize("name", ["rows.txt", "rows.gz", "rows.txt.gz", "rows", "rows.jsonl.zip", "rows.parquet"])
def test_another_kind_of_file_is_refused_by_name(tmp_path, name):
    (tmp_path / name).write_text("{}")
    kinds = "a .jsonl, .json or .csv file, or one of them with .gz behind it"
    with pytest.raises(DataError, match=f"^{tmp_path / name}: not {re.escape(kinds)}$"):
        list_files([str(tmp_path / name)])
    with pytest.raises(DataError, match=f"^{tmp_path}: this folder does not hold {re.escape(kinds)}$"):
        list_files([str(tmp_path)])


def test_what_is_not_there_is_said(tmp_path):
    folder, good, missing = tmp_path / "folder", tmp_path / "good.jsonl", tmp_path / "missing.jsonl"
    folder.mkdir()
    good.write_text("{}")
    with pytest.raises(DataError, match=f"^{missing}: no such file$"):
        list_files([str(good), str(missing)])
    link, loop = folder / "link.csv", folder / "loop.json"
    link.symlink_to(missing)
    loop.symlink_to(loop)
    with pytest.raises(DataError, match=f"^{link}: a link to nothing\n{loop}: a link to nothing$"):
        list_files([str(folder)])
    with pytest.raises(DataError, match=f"^{missing}: can't be read: No such file or directory$"):
        list(read_rows(missing))


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv", "x.jsonl.gz"])
def test_a_pipe_or_a_device_is_refused_and_not_waited_for(tmp_path, name):
    pipe, device = tmp_path / "pipe" / name, tmp_path / "device" / name
    pipe.parent.mkdir()
    device.parent.mkdir()
    os.mkfifo(pipe)
    device.symlink_to("/dev/zero")
    for file in (pipe, device):
        with pytest.raises(DataError, match=f"^{file}: not a regular file, but a pipe or a device"):
            list_files([str(file)])


def test_what_is_no_file_is_passed_over_in_a_folder(tmp_path, monkeypatch):
    folder, good = tmp_path / "folder", tmp_path / "folder" / "good.jsonl"
    (folder / "below").mkdir(parents=True)
    good.write_text("{}")
    monkeypatch.chdir(folder)
    for name in ("a.jsonl", "below/pipe"):
        os.mkfifo(name)
    for name in ("b.jsonl", "below/socket"):
        with socket.socket(socket.AF_UNIX) as stream:
            stream.bind(name)
    for name, target in {"c.jsonl": "/dev/zero", "d": "nothing", "e": "e", "f": "below", "g.jsonl": "."}.items():
        os.symlink(target, name)
    assert list_files([str(folder)]) == [good]
    assert passed_over([str(folder)]) == [
        folder / name for name in ("a.jsonl", "b.jsonl", "below/pipe", "below/socket", "c.jsonl", "d", "e", "f", "g.jsonl")]


@pytest.fixture
def no_root():
    """What is closed to others is open to root."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    yield
    os.seteuid(before)


def test_what_may_not_be_read_is_named(tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)  # what is above it may be closed too
    tmp_path.chmod(0o755)
    Path("folder/closed").mkdir(parents=True)
    Path("folder/a.jsonl").write_text("{}")
    Path("folder/closed/b.jsonl").write_text("{}")
    Path("folder/closed").chmod(0)
    Path("names").mkdir()
    Path("names/a.jsonl").write_text("{}")
    Path("names").chmod(0o444)  # what is in it can be named, and no more
    Path("x.parquet").touch(0)
    request.getfixturevalue("no_root")
    for look in (list_files, passed_over):
        for folder, closed in (("folder", "folder/closed"), ("names", "names/a.jsonl")):
            with pytest.raises(DataError, match=f"^{closed}: can't be read: Permission denied$"):
                look([folder])
    with pytest.raises(HubError, match="^x.parquet: can't be read: Permission denied$"):
        fetch("x.parquet", "train", "cache")


# ---------------------------------------------------------------------------------------------------------------------
# Files → rows

TWO = [row("é\u2028🙂", "a\nb"), row("q", "a")]  # U+2028 ends no line of a file
LINES = [json.dumps(each, ensure_ascii=False).encode() for each in TWO]
GOOD = json.dumps(row("q", "a")).encode()
PRETTY = json.dumps([row("q", "a"), row("q2", "a2")], indent=1).encode()
DEEP = b'{"messages": ' + b"[" * 100_000


def store(file: Path, content: bytes) -> Path:
    file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)
    return file


def damage(file: Path) -> str:
    """What read_rows says of the file, behind the file's name."""
    with pytest.raises(DataError) as raised:
        list(read_rows(file))
    message = str(raised.value)
    assert message.startswith(f"{file}:") and "\n" not in message
    return message.removeprefix(f"{file}:")


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.jsonl.gz", "x.json.gz"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"], ids=["", "BOM"])
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize("in_list", [False, True], ids=["lines", "list"])
def test_bom_crlf_and_blank_lines(tmp_path, name, bom, newline, in_list):
    if in_list and ".jsonl" in name:
        content, numbers, expected = newline.join([b"", b"[]", b"[" + LINES[0] + b"]"]), [2, 3], [[], TWO[:1]]  # each is a row
    elif in_list:
        content, numbers, expected = newline.join([b"", b"[", LINES[0] + b",", b"", LINES[1], b"]", b""]), [3, 5], TWO
    else:  # in a .json file too
        content, numbers, expected = newline.join([b"", LINES[0], b"  ", b"", LINES[1]]), [2, 5], TWO
    assert list(read_rows(store(tmp_path / name, bom + content))) == list(zip(numbers, expected))


@pytest.mark.parametrize("name", ["x.csv", "x.csv.gz"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"], ids=["", "BOM"])
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"], ids=["LF", "CRLF"])
def test_a_table_has_quotes_line_breaks_empty_cells_and_blank_lines(tmp_path, name, bom, newline):
    lines = ["", "instruction,input,output", "Name a fjord,,Oslofjord", "", '"say ""hi"", ', 'twice",é,"hi, hi"', "", "",
             "too few", ",,", 'last,"",7']
    assert list(read_rows(store(tmp_path / name, bom + newline.join(line.encode() for line in lines)))) == [
        (3, {"instruction": "Name a fjord", "output": "Oslofjord"}),
        (5, {"instruction": f'say "hi", {newline.decode()}twice', "input": "é", "output": "hi, hi"}),
        (9, {"instruction": "too few"}), (10, {"output": ""}), (11, {"instruction": "last", "output": "7"})]


@pytest.mark.parametrize("content", [b"", b"\n", b"instruction,output\n", b"\xef\xbb\xbf"])
def test_a_table_without_a_row(tmp_path, content):
    assert list(read_rows(store(tmp_path / "x.csv", content))) == []


def test_a_cell_may_be_as_long_as_a_book(tmp_path):
    (_, read), = read_rows(store(tmp_path / "x.csv", b"prompt,completion\nq," + b"a" * 300_000))
    assert read == {"prompt": "q", "completion": "a" * 300_000}


@pytest.mark.parametrize("content, message", [
    (b"a,b,a\n1,2,3\n", "2: not valid CSV: the header has 'a' twice"),
    (b"a,b\n1,2\n\n1,2,3\n", "4: not valid CSV: more cells than the header has"),
    (b'a,b\n1,2\n"1,2\n3,4\n', "3: not valid CSV: unexpected end of data"),
    (b'a,b\n1,2\n"1"x,2\n', "3: not valid CSV: ',' expected after '\"'"),
    (b'"a,b\n1,2\n', "1: not valid CSV: unexpected end of data"),
    (b"a,b\n1,2\n3,caf\xe9\n", "3: not UTF-8 (byte 0xe9); save the file as UTF-8"),
    (b"a,b\n" + b"1,2\n" * 9_000 + b'"3\n\n\xe9",4\n', "9004: not UTF-8 (byte 0xe9); save the file as UTF-8"),
    (b'a,b\n"' + b"long\n" * 9_000 + b'\xe9",4\n', "9002: not UTF-8 (byte 0xe9); save the file as UTF-8"),
    (b"\xff\xfea\0,\0b\0", "1: not UTF-8 (byte 0xff); save the file as UTF-8"),
])
@pytest.mark.parametrize("name", ["x.csv", "x.csv.gz"])
def test_a_damaged_table_is_named_by_its_line(tmp_path, content, message, name):
    assert damage(store(tmp_path / name, content)) == message


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.jsonl.gz"])
def test_one_object(tmp_path, name):
    assert list(read_rows(store(tmp_path / name, b"\n " + GOOD + b" \n"))) == [(2, row("q", "a"))]


def test_one_object_over_many_lines(tmp_path):
    assert list(read_rows(store(tmp_path / "x.json", json.dumps(row("q", "a"), indent=2).encode()))) == [(1, row("q", "a"))]


FIRSTS = [{"role": "user", "content": "q"}, {"from": "human", "value": "q"}, {"content": "long " * 1000, "role": "user"},
          {"content": [{"type": "text", "text": "q"}], "role": "user"}, {"id": 5, "train": False, "role": "system", "text": "s"},
          {"role": "assistant", "tool_calls": [], "content": None}]


@pytest.mark.parametrize("first", FIRSTS)
def test_a_bare_list_of_messages_is_a_row(tmp_path, first):
    messages = [first, *chat("q", "a")]
    assert list(read_rows(store(tmp_path / "x.jsonl", json.dumps(messages).encode()))) == [(1, messages)]
    assert list(read_rows(store(tmp_path / "x.json", b"\n" + json.dumps(messages, indent=1).encode()))) == [(2, messages)]
    lines = "\n".join([json.dumps(messages), "", json.dumps(messages)])
    assert list(read_rows(store(tmp_path / "lines.json", lines.encode()))) == [(1, messages), (3, messages)]
    assert list(read_rows(store(tmp_path / "list.json", f"[\n{json.dumps(messages)},\n{json.dumps(messages)}]".encode()))) == [
        (2, messages), (3, messages)]
    assert to_conversation(chat("q", "a")) == to_conversation(row("q", "a"))


@pytest.mark.parametrize("first", [
    {"role": "user", "messages": []}, {"role": "assistant", "question": "q", "answer": "a"}, {"from": "de", "to": "en"},
    {"role": 1}, {"role": ["user"]}, {"text": 'it says "role": "user"'}, {"prompt": chat("q"), "completion": "a"}, {}])
def test_a_list_of_rows_is_no_row(tmp_path, first):
    assert list(read_rows(store(tmp_path / "x.json", json.dumps([first, {}], indent=1).encode()))) == [
        (2, first), (json.dumps([first, {}], indent=1).count("\n"), {})]


def test_a_pretty_printed_row_is_named_by_its_first_line(tmp_path):
    starts = [number for number, line in enumerate(PRETTY.decode().splitlines(), 1) if line == " {"]
    assert [line for line, _ in read_rows(store(tmp_path / "x.json", PRETTY))] == starts == [2, 14]


@pytest.mark.parametrize("content, said", [
    (b'{"messages": [', "not valid JSON at column 15: Expecting value"),
    (b"[1, 2", "not valid JSON at column 6: Expecting ',' delimiter"),
    (GOOD + b" {}", f"not valid JSON at column {len(GOOD) + 2}: Extra data"),
    (b"text", "not valid JSON at column 1: Expecting value"),
    (GOOD.replace(b'"q"', b'"caf\xe9"'), "not UTF-8 (byte 0xe9); save the file as UTF-8"),
    (GOOD.replace(b'"q"', b'"\0"'), f"not valid JSON at column {GOOD.index(b'q', 40) + 1}: Invalid control character at"),
    (b"\0\0\0", "not valid JSON at column 1: Expecting value"),
    (DEEP, "not valid JSON at column 1: maximum recursion depth exceeded while decoding a JSON array from a unicode string"),
    (GOOD.replace(b'"q"', b"1" * 5000), "not valid JSON at column 1: Exceeds the limit (4300 digits) for integer string "
     "conversion: value has 5000 digits; use sys.set_int_max_str_digits() to increase the limit"),
])
@pytest.mark.parametrize("name", ["bad.jsonl", "bad.jsonl.gz"])
def test_a_line_that_is_not_json_is_named(tmp_path, content, said, name):
    assert damage(store(tmp_path / name, GOOD + b"\n\n" + content + b"\n" + GOOD)) == f"3: {said}"


@pytest.mark.parametrize("content, at", [(b"[\n" + GOOD + b"\n]", "2: Expecting value"),
                                         (b"{\n", "2: Expecting property name enclosed in double quotes")])
def test_a_json_file_called_jsonl_is_told_its_right_name(tmp_path, content, at):
    assert damage(store(tmp_path / "x.jsonl", content)) == (
        f"1: not valid JSON at column {at}; a row is one line of a .jsonl file: where it goes on, or is in a list, name the file "
        ".json")


def line_of(part: bytes) -> int:
    return PRETTY[:PRETTY.rindex(part)].count(b"\n") + 1


@pytest.mark.parametrize("content, line, said", [
    (PRETTY[:-40], PRETTY[:-40].count(b"\n") + 1, "not valid JSON at column "),
    (PRETTY.replace(b'"q2"', b'"caf\xe9"'), line_of(b'"q2"'), "not UTF-8 (byte 0xe9); save the file as UTF-8"),
    (PRETTY.replace(b'"q2"', b'"\0"'), line_of(b'"q2"'), "not valid JSON at column "),
    (PRETTY.replace(b'"q2"', DEEP), line_of(b'{\n  "messages"'), "not valid JSON at column 2: maximum recursion depth exceeded"),
    (PRETTY.replace(b'"q"', DEEP), 2, "not valid JSON at column 2: maximum recursion depth exceeded"),
    (b"[\n\n" + GOOD + b"\n" + GOOD + b"]", 4, "not valid JSON at column 1: expected ',' or ']' after a row"),
    (b"[\n" + GOOD + b",\n]", 3, None), (b"[\n" + GOOD + b",\n", 3, "not valid JSON at column 1: expected ']' at the end"),
    (b"[\n" + GOOD + b"\n]\ntrailing", 3, "not valid JSON at column 2: text after the list of rows"),
    (b"[", 1, "not valid JSON at column 2: expected ']' at the end of the list of rows"),
    (GOOD + b"\n" + GOOD[:-1], 2, f"not valid JSON at column {len(GOOD)}: Expecting ',' delimiter"),
    (json.dumps(chat("q", "a")).encode() + b"\n]", 2, "not valid JSON at column 1: Expecting value"),
])
def test_a_bad_json_file_is_named_with_the_right_line(tmp_path, content, line, said):
    file = store(tmp_path / "bad.json", content)
    if said is None:
        assert list(read_rows(file)) == [(2, row("q", "a"))]  # a comma too many takes nothing away
    else:
        assert damage(file).startswith(f"{line}: {said}")


@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "x.json.gz", "x.jsonl.gz"])
@pytest.mark.parametrize("content", [b"", b" \n", b"\xef\xbb\xbf\n"])
def test_a_file_without_a_row(tmp_path, name, content):
    assert list(read_rows(store(tmp_path / name, content))) == []


def test_an_empty_list_is_no_row_in_json_and_a_bad_one_in_a_line(tmp_path):
    assert list(read_rows(store(tmp_path / "x.json", b"[]"))) == []
    assert list(read_rows(store(tmp_path / "x.jsonl", b"[]"))) == [(1, [])]


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.json.gz", "x.csv.gz"])
@pytest.mark.parametrize("harm, said", [
    (lambda packed: packed[:-9], "can't be read: Compressed file ended before the end-of-stream marker was reached"),
    (lambda packed: packed[:-8] + b"\0" * 8, "can't be read: CRC check failed"),
    (lambda packed: packed[:40] + b"\xff" * 40 + packed[80:], "can't be read: Error -3 while decompressing data: "),
    (lambda packed: b"instruction,output\n", "can't be read: Not a gzipped file (b'in')"),
    (lambda packed: packed[:15], "can't be read: Compressed file ended before the end-of-stream marker was reached"),
], ids=["cut off", "checksum", "overwritten", "not packed", "nearly all gone"])
def test_a_damaged_gz_is_said(tmp_path, name, harm, said):
    lines, cells = zip(*((json.dumps(row(f"question {i}", str(i * i))), f"question {i},{i * i}") for i in range(100)))
    text = {"x.jsonl.gz": "\n".join(lines), "x.json.gz": f"[{','.join(lines)}]",
            "x.csv.gz": "\n".join(["prompt,completion", *cells])}[name]
    file = tmp_path / name
    packed = gzip.compress(text.encode())
    file.write_bytes(packed)
    assert len(list(read_rows(file))) == 100
    file.write_bytes(harm(packed))
    assert damage(file).startswith(f" {said}")


# ---------------------------------------------------------------------------------------------------------------------
# Shapes

SHAPES = {
    "messages": {"messages": chat("q1", "a1", "q2", "a2", system="s")},
    "a list": chat("q1", "a1", "q2", "a2", system="s"),
    "JSON text": {"messages": json.dumps(chat("q1", "a1", "q2", "a2", system="s"))},
    "a system column": {"messages": chat("q1", "a1", "q2", "a2"), "system": "s"},
    "prompt and completion": {"prompt": chat("q1", "a1", "q2", system="s"), "completion": chat("", "a2")[1:]},
    "prompt and a message": {"prompt": chat("q1", "a1", "q2", system="s"), "completion": chat("", "a2")[1]},
    "prompt and text": {"prompt": chat("q1", "a1", "q2", system="s"), "completion": "a2"},
    "history": {"system": "s", "history": [["q1", "a1"]], "instruction": "q2", "input": "", "output": "a2"},
    "history in JSON text": {"system_prompt": "s", "history": '[["q1", "a1"]]', "query": "q2", "response": "a2"},
    "ShareGPT": {"id": 7, "conversations": [
        {"from": "system", "value": "s"}, {"from": "human", "value": "q1"}, {"from": "gpt", "value": "a1"},
        {"from": "human", "value": "q2"}, {"from": "gpt", "value": "a2"}]},
    "ShareGPT by another name": {"conversation": chat("q1", "a1", "q2", "a2"), "system": "s"},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_all_shapes_give_the_same_messages(shape):
    conversation = to_conversation(SHAPES[shape])
    assert [(m["role"], m["content"]) for m in conversation.messages] == [
        ("system", "s"), ("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2")]
    trained = [m["content"] for m in conversation.messages if m["role"] == "assistant" and m["train"]]
    # of a prompt and of a history, nothing is trained
    assert trained == (["a2"] if shape.startswith(("prompt", "history")) else ["a1", "a2"])
    assert (conversation.tools, conversation.text, conversation.n_left_out) == ([], None, 0)
    assert conversation.unread == ({"id"} if shape == "ShareGPT" else set())


QUESTIONS, INPUTS = ["instruction", "question", "query", "prompt", "inputs"], ["input", "context"]
ANSWERS = ["output", "response", "answer", "completion", "targets"]


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("question", QUESTIONS)
def test_a_question_and_its_answer_by_any_name(question, answer):
    asked, told = {"role": "user", "content": "q", "train": False}, {"role": "assistant", "content": "a", "train": True}
    assert to_conversation({question: "q", answer: "a"}) == ([asked, told], [], None, set(), 0, {})
    for key in INPUTS:
        assert said({question: "q", key: "i", answer: "a"}) == [("user", "q\n\ni"), ("assistant", "a")]
        assert said({question: "q", key: "", answer: "a"}) == [("user", "q"), ("assistant", "a")]
        assert said({question: "q", key: None, answer: "a"}) == [("user", "q"), ("assistant", "a")]
        assert said({question: "", key: "i", answer: "a"}) == [("user", "i"), ("assistant", "a")]
        assert said({key: "i", answer: "a"}) == [("user", "i"), ("assistant", "a")]
    assert said({question: chat("q1", "a1", "q"), answer: "a"})[1:] == [("assistant", "a1"), ("user", "q"), ("assistant", "a")]
    assert refusal({question: 5, answer: "a"}) == f"{question} must be a text, not 5"
    assert refusal({question: "q", answer: 1.5}) == f"{answer} must be a text, not 1.5"
    assert refusal({question: chat("q", None), answer: "a"}) == f"{question}[1].content must be a text, not null"
    assert refusal({question: "q", answer: chat("q", None)}) == f"{answer}[1].content must be a text, not null"


@pytest.mark.parametrize("names", [QUESTIONS, INPUTS, ANSWERS, ["system", "system_prompt"], ["tools", "functions"]])
def test_two_names_of_the_same_are_refused(names):
    others = {key: "x" for key in ("prompt", "completion") if key not in names}
    for first, second in itertools.combinations(names, 2):
        message = f"{first} and {second} mean the same; only one of them can be read"
        assert refusal(others | {first: "x", second: "x"}) == refusal(others | {second: "x", first: "x"}) == message
        assert refusal(others | {first: "x", second: "x", "messages": None}) == message


def test_a_column_that_is_null_is_no_second_name():
    whole = {"question": "q", "prompt": None, "answer": "a", "output": None, "messages": None, "system_prompt": "s",
             "system": None}
    assert to_conversation(whole) == to_conversation({"question": "q", "answer": "a", "system": "s"})


def test_two_names_of_the_messages_are_refused():
    assert refusal({"messages": chat("q", "a"), "conversations": chat("q", "a")}) == \
        "messages and conversations mean the same; only one of them can be read"
    assert refusal([{"role": "user", "from": "human", "content": "q"}]) == \
        "role and from mean the same; only one of them can be read"
    assert refusal([{"role": "user", "value": "q", "text": "q"}]) == "value and text mean the same; only one of them can be read"


@pytest.mark.parametrize("system", ["system", "system_prompt"])
def test_a_column_of_system_messages(system):
    for whole in ({"prompt": "q", "completion": "a"}, {"messages": chat("q", "a")}, {"instruction": "q", "output": "a"}):
        assert to_conversation(whole | {system: "s"}).messages[0] == {"role": "system", "content": "s", "train": False}
        assert said(whole | {system: "s"}) == [("system", "s"), ("user", "q"), ("assistant", "a")]
        assert said(whole | {system: ""}) == said(whole | {system: None}) == [("user", "q"), ("assistant", "a")]
        assert refusal(whole | {system: 5}) == "system must be a text, not 5"


def test_history_stands_before_the_question_and_is_not_trained():
    whole = {"system": "s", "history": [["q1", "a1"], ["q2", "a2"]], "instruction": "q3", "input": "i3", "output": "a3"}
    assert [(m["role"], m["content"], m["train"]) for m in to_conversation(whole).messages] == [
        ("system", "s", False), ("user", "q1", False), ("assistant", "a1", False), ("user", "q2", False),
        ("assistant", "a2", False), ("user", "q3\n\ni3", False), ("assistant", "a3", True)]
    for nothing in ([], "", None):
        assert said({"history": nothing, "instruction": "q", "output": "a"}) == [("user", "q"), ("assistant", "a")]


@pytest.mark.parametrize("history, message", [
    (5, "history must be a list of [question, answer], not 5"),
    (True, "history must be a list of [question, answer], not true"),
    ({"q": "a"}, 'history must be a list of [question, answer], not {"q": "a"}'),
    ("q1", 'history must be JSON, not "q1"'), ('"q1"', 'history must be a list of [question, answer], not "q1"'),
    (["q1", "a1"], 'history[0] must be [question, answer], not "q1"'),
    ([["q1", "a1"], ["q2"]], 'history[1] must be [question, answer], not ["q2"]'),
    ([["q1", "a1", "q2"]], 'history[0] must be [question, answer], not ["q1", "a1", "q2"]'),
    ([["q1", "a1"], ["q2", None]], "history[1] must be a text, not null"), ([[5, "a1"]], "history[0] must be a text, not 5"),
])
def test_a_history_of_another_form_is_refused(history, message):
    assert refusal({"instruction": "q", "output": "a", "history": history}) == message


def test_a_text():
    assert to_conversation({"text": " long\n"}) == ([], [], " long\n", set(), 0, {})
    assert to_conversation({"text": "long", "meta": {}, "id": 0, "url": None}) == ([], [], "long", {"meta", "id"}, 0, {})
    assert refusal({"text": 5}) == "text must be a text, not 5"
    assert refusal({"text": "\ud83d"}) == "text holds half of a surrogate pair (\\ud83d): not a character"
    # beside question and answer it holds both once more, written out
    assert to_conversation({"instruction": "q", "output": "a", "text": "q a"}).unread == {"text"}


UNKNOWN = "; known are messages, prompt + completion, instruction (+ input) + output, conversations, text"


@pytest.mark.parametrize("bad, message", [
    (None, "a row must be a JSON object, not null"), ("text", 'a row must be a JSON object, not "text"'),
    (5, "a row must be a JSON object, not 5"), ("x" * 100, f'a row must be a JSON object, not "{"x" * 39}'),
    ({}, "the keys [] fit no shape of row" + UNKNOWN), ({"prompt": "x"}, "the keys ['prompt'] fit no shape of row" + UNKNOWN),
    ({"output": "x", "id": 1}, "the keys ['id', 'output'] fit no shape of row" + UNKNOWN),
    ({"instruction": "x", "output": None}, "the keys ['instruction', 'output'] fit no shape of row" + UNKNOWN),
    ({"messages": None}, "the keys ['messages'] fit no shape of row" + UNKNOWN),
    ({"messages": [], "prompt": "q", "completion": "a"},
     "the keys ['completion', 'messages', 'prompt'] fit more than one shape of row" + UNKNOWN),
    ({"conversations": chat("q", "a"), "question": "q", "answer": "a"},
     "the keys ['answer', 'conversations', 'question'] fit more than one shape of row" + UNKNOWN),
    ([], "messages must be a list of messages and not be empty"),
    ({"conversations": []}, "conversations must be a list of messages and not be empty"),
    ({"messages": "text"}, 'messages must be JSON, not "text"'),
    ({"messages": '"text"'}, "messages must be a list of messages and not be empty"),
    ({"conversation": {"role": "user"}}, "conversation must be a list of messages and not be empty"),
    ({"prompt": [], "completion": "a"}, "prompt must be a list of messages and not be empty"),
])
def test_what_is_no_row_is_refused(bad, message):
    assert refusal(bad) == message


def test_messages_win_over_a_question_without_an_answer():
    conversation = to_conversation({"prompt": "q", "prompt_id": "7", "messages": chat("q", "a")})
    assert [m["content"] for m in conversation.messages] == ["q", "a"] and conversation.unread == {"prompt", "prompt_id"}


@pytest.mark.parametrize("asked, expected", [
    ({"prompt": "q"}, [("user", "q")]), ({"input": "i"}, [("user", "i")]),
    ({"question": "q", "context": "i", "system": "s"}, [("system", "s"), ("user", "q\n\ni")]),
    ({"prompt": chat("q1", "a1", "q2")}, [("user", "q1"), ("assistant", "a1"), ("user", "q2")]),
    ({"instruction": "q2", "history": [["q1", "a1"]]}, [("user", "q1"), ("assistant", "a1"), ("user", "q2")]),
    ({"messages": chat("q")}, [("user", "q")]), ({"messages": chat("q"), "prompt": "p"}, [("user", "q")]),
    ({"messages": [], "prompt": "p"}, None), ({"prompt": "q", "completion": "a"}, [("user", "q"), ("assistant", "a")])])
def test_a_question_alone_is_a_row_where_no_answer_is_needed(asked, expected):
    if expected is None:
        with pytest.raises(ValueError, match=r"^the keys \['messages', 'prompt'\] fit more than one shape"):
            to_conversation(asked, answered=False)
    else:
        assert said(asked, answered=False) == expected
    if "completion" not in asked and "messages" not in asked:
        assert " fit no shape of row" in refusal(asked)


@pytest.mark.parametrize("empty", [{}, {"id": 1}, {"output": "a"}])
def test_where_no_answer_is_needed_a_question_is(empty):
    with pytest.raises(ValueError, match=f"^the keys {re.escape(str([*empty]))} fit no shape of row"):
        to_conversation(empty, answered=False)


# ---------------------------------------------------------------------------------------------------------------------
# Keys


@pytest.mark.parametrize("key, why", [
    *[(key, "preferences are for dpo.py") for key in ("chosen", "rejected")],
    *[(key, "only text is trained here") for key in ("image", "images", "video", "videos", "audio", "audios")],
    *[(key, "judged answers are for KTO, not for supervised training") for key in ("label", "kto_tag")],
    ("loss_weight", "an answer is trained or not: weight 1 or 0, or train true or false, in its message")])
def test_a_key_that_means_something_else_is_refused_unless_empty(key, why):
    for whole in ({"messages": chat("q", "a")}, {"prompt": "q", "completion": "a"}, {"text": "t"}):
        for value in ("x", ["x"], {"role": "assistant"}, 0, 1, False, True, 0.5):
            assert refusal(whole | {key: value}) == f"{key} can't be trained on: {why}"
        for nothing in (None, "", [], {}):
            assert to_conversation(whole | {key: nothing}) == to_conversation(whole)
    question, answer = chat("q", "a")
    assert refusal([question, answer | {key: "x"}]) == f"messages[1].{key} can't be trained on: {why}"
    assert to_conversation([question | {key: None}, answer | {key: []}]) == to_conversation([question, answer])


def test_keys_that_mean_nothing_are_named():
    question, answer = chat("q", "a")
    conversation = to_conversation({"messages": [question | {"date": 1}, answer | {"date": 2, "score": 0, "refusal": None}],
                                    "source": "web", "id": 0, "license": None, "skill": "add"})
    assert conversation.unread == {"source", "id", "messages[].date", "messages[].score"}
    assert conversation.messages == to_conversation([question, answer]).messages
    prompted = to_conversation({"query": [question | {"date": 1}], "answer": [answer | {"score": 0}], "skill": 5, "split": "x"})
    assert prompted.unread == {"split", "query[].date", "answer[].score"}
    called = to_conversation([question, {"role": "assistant", "tool_calls": [
        {"index": 0, "id": "x", "type": "function", "function": {"name": "f", "arguments": {}, "result": 5, "strict": None}}]}])
    assert called.unread == {"messages[].tool_calls[].result"}


@pytest.mark.parametrize("key, yes, no", [("train", True, False), ("loss", True, False), ("weight", 1, 0)])
@pytest.mark.parametrize("left_out, expected", [
    ({1}, ["four"]), ({3}, ["two"]), ({1, 3}, []), ({0, 2}, ["two", "four"]), (set(), ["two", "four"])])
@pytest.mark.parametrize("role, content, names", [
    ("role", "content", ("user", "assistant")), ("from", "value", ("human", "gpt"))])
def test_an_answer_is_left_out_of_training(key, yes, no, left_out, expected, role, content, names):
    for others in ({}, {key: yes}, {key: None}):
        marked = [{role: names[i % 2], content: text, **({key: no} if i in left_out else others)}
                  for i, text in enumerate(["one", "two", "three", "four"])]
        conversation = to_conversation({"conversations": marked})
        assert [m["content"] for m in conversation.messages] == ["one", "two", "three", "four"]
        assert [m["content"] for m in conversation.messages if m["role"] == "assistant" and m["train"]] == expected
        assert not conversation.unread


@pytest.mark.parametrize("key, wrong, words", [
    *[(key, wrong, "true or false") for key in ("train", "loss") for wrong in (0, 1, 1.0, "false", "", [], 2)],
    *[("weight", wrong, "1 or 0") for wrong in (True, False, 0.5, 2, -1, "1", [1])]])
def test_a_weight_of_another_kind_is_refused(key, wrong, words):
    assert refusal([*chat("q"), {"role": "assistant", "content": "a", key: wrong}]) == \
        f"messages[1].{key} must be {words}, not {json.dumps(wrong)}"


def test_each_mark_leaves_an_answer_out_by_itself():
    for marks in itertools.product([True, False, None], [True, False, None], [1, 0, 1.0, 0.0, None]):
        answer = {"role": "assistant", "content": "a", **dict(zip(("train", "loss", "weight"), marks))}
        assert to_conversation([*chat("q"), answer]).messages[1]["train"] == all(mark in (True, None) for mark in marks)


# ---------------------------------------------------------------------------------------------------------------------
# Messages


@pytest.mark.parametrize("role, expected", [
    ("system", "system"), ("developer", "developer"), ("user", "user"), ("human", "user"), ("prompter", "user"),
    ("assistant", "assistant"), ("gpt", "assistant"), ("chatgpt", "assistant"), ("bot", "assistant"), ("model", "assistant"),
    ("tool", "tool"), ("function", "tool"), ("observation", "tool"), ("ipython", "tool"), ("function_response", "tool"),
    ("tool_response", "tool")])
@pytest.mark.parametrize("content", ["content", "value", "text"])
@pytest.mark.parametrize("key", ["role", "from"])
def test_roles_and_contents_by_any_name(role, expected, content, key):
    messages = [{"role": "user", "content": "q"}, {key: role, content: "words"}]
    assert said(messages) == [("user", "q"), (expected, "words")]
    assert to_conversation(messages).messages[1] == {"role": expected, "content": "words", "train": True}


@pytest.mark.parametrize("role", ["critic", "User", "", "a\nb\ud800"])
@pytest.mark.parametrize("key", ["role", "from"])
def test_an_unknown_role_is_refused(role, key):
    assert refusal([{key: role, "content": "x"}]) == (
        f"messages[0].role is {json.dumps(role)}; known are system, developer, user, assistant, tool, function_call, tool_call, "
        "human, prompter, gpt, chatgpt, bot, model, function, observation, ipython, function_response, tool_response")


@pytest.mark.parametrize("changes, message", [
    ({"content": None}, ".content must be a text, not null"), ({"content": 42}, ".content must be a text, not 42"),
    ({"content": {"text": "a"}}, '.content must be a text, not {"text": "a"}'),
    ({"content": ["a"]}, ".content[0] is a part of type null; only text can be read"),
    ({"content": "\ud83d"}, ".content holds half of a surrogate pair (\\ud83d): not a character"),
    ({"role": None}, ' must be {"role": ..., "content": ...}'), ({"role": 5}, ".role is 5; known are system, "),
    ({"role": ["user"]}, '.role is ["user"]; known are system, '), ({"name": 5}, ".name must be a text, not 5"),
    ({"tool_call_id": 5}, ".tool_call_id must be a text, not 5"),
    ({"reasoning_content": 5}, ".reasoning_content must be a text, not 5"),
    ({"thinking": "\udc00"}, ".reasoning_content holds half of a surrogate pair (\\udc00): not a character"),
])
def test_a_bad_message_is_named(changes, message):
    question, answer = chat("q", "a")
    assert refusal([question, answer | changes]).startswith(f"messages[1]{message}")
    assert refusal({"conversations": [answer | changes, question]}).startswith(f"conversations[0]{message}")
    assert refusal({"prompt": "q", "completion": [answer | changes]}).startswith(f"completion[0]{message}")


@pytest.mark.parametrize("message", ["text", None, 5, [], ["user", "q"], {}, {"content": "q"}])
def test_what_is_no_message_is_refused(message):
    assert refusal([message]) == 'messages[0] must be {"role": ..., "content": ...}'


def test_white_space_is_left_as_it_is():
    assert said(row(" q\n", "\n a \t")) == [("user", " q\n"), ("assistant", "\n a \t")]
    assert said({"instruction": " q\n", "input": " i", "output": "\n a "}) == [("user", " q\n\n\n i"), ("assistant", "\n a ")]


def test_any_order_of_roles_is_taken():
    for roles in itertools.product(["system", "user", "assistant", "tool"], repeat=3):
        messages = [*chat("q"), *({"role": role, "content": f"{role} {i}"} for i, role in enumerate(roles))]
        assert said(messages) == [(message["role"], message["content"]) for message in messages]


@pytest.mark.parametrize("beginning, kept, n_left_out", [
    (["assistant"], [], 1), (["assistant", "assistant"], [], 2), (["system", "assistant"], ["system"], 1),
    (["assistant", "system"], ["system"], 1), (["developer", "assistant", "tool", "assistant"], ["developer"], 2),
    (["tool"], [], 0), (["system", "system"], ["system", "system"], 0), ([], [], 0)])
def test_answers_before_the_first_question_are_left_out_and_counted(beginning, kept, n_left_out):
    conversation = to_conversation([*({"role": role, "content": "early"} for role in beginning), *chat("q", "a")])
    assert [m["role"] for m in conversation.messages] == [*kept, "user", "assistant"]
    assert [m["content"] for m in conversation.messages] == ["early"] * len(kept) + ["q", "a"]
    assert conversation.n_left_out == n_left_out


def test_a_conversation_without_a_question_has_only_its_system_message():
    conversation = to_conversation(chat(system="s") + [{"role": "assistant", "content": "a"}])
    assert (conversation.messages, conversation.n_left_out) == ([{"role": "system", "content": "s", "train": True}], 1)


@pytest.mark.parametrize("kind", ["text", "input_text", "output_text"])
def test_text_in_parts_is_joined(kind):
    parts = [{"type": kind, "text": "one "}, {"type": "text", "text": "two\n", "annotations": []}, {"type": kind, "text": "3"}]
    for role in ("user", "assistant", "system", "tool"):
        assert said([*chat("q"), {"role": role, "content": parts}])[1] == (role, "one two\n3")
    assert said([*chat("q"), {"role": "assistant", "content": []}])[1] == ("assistant", "")


@pytest.mark.parametrize("part, message", [
    ({"type": "image"}, ' is a part of type "image"; only text can be read'),
    ({"type": "image_url", "image_url": {"url": "x"}}, ' is a part of type "image_url"; only text can be read'),
    ({"type": "input_audio"}, ' is a part of type "input_audio"; only text can be read'),
    ({"text": "x"}, " is a part of type null; only text can be read"), (5, " is a part of type null; only text can be read"),
    ({"type": "text"}, ".text must be a text, not null"), ({"type": "text", "text": 5}, ".text must be a text, not 5"),
    ({"type": "thinking", "thinking": 5}, ".thinking must be a text, not 5")])
def test_another_kind_of_part_is_refused_by_name(part, message):
    for role in ("user", "assistant", "tool"):
        parts = [{"type": "text", "text": "x"}, part]
        assert refusal([*chat("q"), {"role": role, "content": parts}]) == f"messages[1].content[1]{message}"


# ---------------------------------------------------------------------------------------------------------------------
# Thoughts


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_a_thought_by_any_name(key):
    def answer(**changes) -> dict:
        return to_conversation([*chat("q"), {"role": "assistant", "content": "a", **changes}]).messages[1]

    assert answer(**{key: "hm"}) == {"role": "assistant", "content": "a", "train": True, "reasoning_content": "hm"}
    assert answer(**{key: ""}) == answer(**{key: None}) == {"role": "assistant", "content": "a", "train": True}
    assert answer(content=None, **{key: "hm"}) == {"role": "assistant", "content": "", "train": True, "reasoning_content": "hm"}
    with pytest.raises(ValueError, match=r"^messages\[1\].content must be a text, not null$"):
        answer(content=None, **{key: ""})


@pytest.mark.parametrize("kind", ["thinking", "reasoning"])
def test_a_thought_among_the_parts(kind):
    parts = [{"type": kind, kind: "hm, "}, {"type": "text", "text": "a"}, {"type": kind, kind: "so"}]
    assert to_conversation([*chat("q"), {"role": "assistant", "content": parts}]).messages[1] == {
        "role": "assistant", "content": "a", "train": True, "reasoning_content": "hm, so"}


# ---------------------------------------------------------------------------------------------------------------------
# Tools

LOOK_UP = {"name": "look_up", "parameters": {"type": "object", "properties": {"word": {"type": "string"}}}}
AS_TOOL = {"type": "function", "function": LOOK_UP}


@pytest.mark.parametrize("key", ["tools", "functions"])
@pytest.mark.parametrize("written", [
    [AS_TOOL], [LOOK_UP], AS_TOOL, LOOK_UP, json.dumps([AS_TOOL]), json.dumps([LOOK_UP]), json.dumps(LOOK_UP),
    [json.dumps(AS_TOOL)]])
def test_tools_in_any_form(key, written):
    for whole in ({"messages": chat("q", "a")}, {"prompt": "q", "completion": "a"}):
        assert to_conversation(whole | {key: written}).tools == [AS_TOOL]
        for nothing in (None, [], "", "[]"):
            assert to_conversation(whole | {key: nothing}) == to_conversation(whole)


@pytest.mark.parametrize("written, message", [
    ("look_up", 'tools must be JSON, not "look_up"'), (["look_up"], 'tools[0] must be JSON, not "look_up"'),
    ([AS_TOOL, {"type": "function"}], 'tools[1] must be {"type": "function", "function": {"name": ..., ...}}, not {"type": '
     '"function"}'),
    ([{"function": {"name": 5}}], 'tools[0] must be {"type": "function", "function": {"name": ..., ...}}, not {"function": '
     '{"name": 5}}'),
    (5, 'tools[0] must be {"type": "function", "function": {"name": ..., ...}}, not 5'),
    ([LOOK_UP | {"description": "\ud800"}], "tools[0] holds half of a surrogate pair (\\ud800): not a character"),
])
def test_bad_tools_are_refused(written, message):
    assert refusal({"messages": chat("q", "a"), "tools": written}) == message


def call(name: str, arguments: object, id: str) -> dict:
    return {"type": "function", "function": {"name": name, "arguments": arguments}, "id": id}


FORMS = {
    "OpenAI": {"role": "assistant", "tool_calls": [
        {"id": "call00001", "type": "function", "function": {"name": "look_up", "arguments": {"word": "fen"}}}]},
    "arguments in JSON text": {"role": "assistant", "tool_calls": [
        {"id": "call00001", "type": "function", "function": {"name": "look_up", "arguments": '{"word": "fen"}'}}]},
    "no id": {"role": "assistant", "tool_calls": [{"function": {"name": "look_up", "arguments": {"word": "fen"}}}]},
    "an id that is no text": {"role": "assistant", "tool_calls": [
        {"id": 7, "function": {"name": "look_up", "arguments": {"word": "fen"}}}]},
    "bare": {"role": "assistant", "tool_calls": [{"name": "look_up", "arguments": {"word": "fen"}}]},
    "by its parameters": {"role": "assistant", "tool_calls": [{"name": "look_up", "parameters": {"word": "fen"}}]},
    "alone": {"role": "assistant", "tool_calls": {"name": "look_up", "arguments": {"word": "fen"}}},
    "each in JSON text": {"role": "assistant", "tool_calls": ['{"name": "look_up", "arguments": {"word": "fen"}}']},
    "OpenAI's old": {"role": "assistant", "content": None, "tool_calls": [],
                     "function_call": {"name": "look_up", "arguments": '{"word": "fen"}'}},
    "ShareGPT": {"from": "function_call", "value": '{"name": "look_up", "arguments": {"word": "fen"}}'},
    "ShareGPT, an object": {"from": "tool_call", "value": {"name": "look_up", "arguments": {"word": "fen"}}},
    "ShareGPT, a list": {"from": "function_call", "value": '[{"name": "look_up", "arguments": {"word": "fen"}}]'},
}


@pytest.mark.parametrize("form", FORMS)
def test_a_call_in_any_form(form):
    question, message = chat("q")[0], FORMS[form]
    expected = {"role": "assistant", "content": "", "train": True, "tool_calls": [call("look_up", {"word": "fen"}, "call00001")]}
    conversation = to_conversation([question, message])
    assert conversation.messages[1] == expected and not conversation.unread
    changes = [({"train": False}, {"train": False}), ({"thinking": "hm"}, {"reasoning_content": "hm"})]
    if "role" in message:
        changes += [({"content": None}, {}), ({"content": ""}, {}), ({"content": "I look."}, {"content": "I look."})]
    for change, changed in changes:
        assert to_conversation([question, message | change]).messages[1] == expected | changed


@pytest.mark.parametrize("written, expected", [
    ("fen, please", "fen, please"), ('{"word": ', '{"word": '), ("", {}), (None, {}), ("{}", {}), ({}, {}), ("[1]", [1]),
    ('{"word": "{}"}', {"word": "{}"})])
@pytest.mark.parametrize("key", ["arguments", "parameters"])
def test_arguments_stay_text_only_where_they_are_no_json(key, written, expected):
    message = {"role": "assistant", "tool_calls": [{"function": {"name": "look_up", key: written}}]}
    assert to_conversation([*chat("q"), message]).messages[1]["tool_calls"] == [call("look_up", expected, "call00001")]


@pytest.mark.parametrize("calls, message", [
    ([{"name": 5}], 'tool_calls[0] must be {"function": {"name": ..., "arguments": ...}}, not {"name": 5}'),
    ([{"function": "f"}], 'tool_calls[0] must be {"function": {"name": ..., "arguments": ...}}, not {"function": "f"}'),
    ([{"name": "f", "arguments": {}}, {"name": "f", "arguments": "\ud800"}],
     "tool_calls[1] holds half of a surrogate pair (\\ud800): not a character"),
    ([{"name": "f"}, "f(x)"], 'tool_calls[1] must be JSON, not "f(x)"'),
    (5, 'tool_calls[0] must be {"function": {"name": ..., "arguments": ...}}, not 5'),
    ([{"name": "f", "arguments": {"x": 1}, "parameters": {"x": 2}}],
     "arguments and parameters mean the same; only one of them can be read"),
])
def test_a_bad_call_is_refused(calls, message):
    said = refusal([*chat("q"), {"role": "assistant", "content": "", "tool_calls": calls}])
    assert said == (message if message.startswith("arg") else f"messages[1].{message}")


def test_a_function_call_that_is_no_call_is_refused():
    assert refusal([*chat("q"), {"from": "function_call", "value": "look_up(fen)"}]) == \
        'messages[1].content must be JSON, not "look_up(fen)"'
    assert refusal([*chat("q"), {"from": "function_call", "value": '{"word": "fen"}'}]) == \
        'messages[1].tool_calls[0] must be {"function": {"name": ..., "arguments": ...}}, not {"word": "fen"}'
    assert refusal([*chat("q"), {"role": "assistant", "content": None, "tool_calls": []}]) == \
        "messages[1].content must be a text, not null"


def test_a_whole_conversation_with_a_tool():
    """The same in OpenAI's form, in its old one and in ShareGPT's."""
    calls = [call("look_up", {"word": "fen"}, "call00001")]
    expected = [{"role": "user", "content": "q", "train": True},
                {"role": "assistant", "content": "", "train": True, "tool_calls": calls},
                {"role": "tool", "content": '{"means": "bog"}', "train": True, "tool_call_id": "call00001", "name": "look_up"},
                {"role": "assistant", "content": "a bog", "train": True}]
    openai = [*chat("q"), FORMS["OpenAI"], {"role": "tool", "tool_call_id": "call00001", "name": "look_up",
                                            "content": '{"means": "bog"}'}, *chat("", "a bog")[1:]]
    old = [*chat("q"), FORMS["OpenAI's old"], {"role": "function", "name": "look_up", "content": '{"means": "bog"}'},
           *chat("", "a bog")[1:]]
    sharegpt = [{"from": "human", "value": "q"}, FORMS["ShareGPT"], {"from": "observation", "value": '{"means": "bog"}'},
                {"from": "gpt", "value": "a bog"}]
    as_object = [*chat("q"), FORMS["no id"], {"role": "tool", "content": {"means": "bog"}}, *chat("", "a bog")[1:]]
    for messages in (openai, old, sharegpt, as_object):
        conversation = to_conversation({"conversations": messages, "tools": json.dumps([LOOK_UP]), "system": ""})
        assert conversation == (expected, [AS_TOOL], None, set(), 0, {})


def results(calls: list[dict], *given: dict) -> list[tuple]:
    """(tool_call_id, name) of the results that follow the calls, and the calls' ids before them."""
    tools = [{"role": "tool", "content": "x"} | each for each in given]
    _, called, *rest = to_conversation([*chat("q"), {"role": "assistant", "tool_calls": calls}, *tools]).messages
    return [tuple(each["id"] for each in called["tool_calls"]), *((m.get("tool_call_id"), m.get("name")) for m in rest)]


def test_calls_and_results_without_ids_are_given_them_in_order():
    a, b = {"name": "a"}, {"name": "b"}
    assert results([a, b], {}, {}) == [("call00001", "call00002"), ("call00001", "a"), ("call00002", "b")]
    assert results([a, b], {"name": "b"}, {"name": "a"}) == [("call00001", "call00002"), ("call00002", "b"), ("call00001", "a")]
    assert results([a, a], {"name": "a"}, {"name": "a"}) == [("call00001", "call00002"), ("call00001", "a"), ("call00002", "a")]
    assert results([a, b], {"name": "c"}, {}) == [("call00001", "call00002"), ("call00001", "c"), ("call00002", "b")]
    assert results([a], {}, {}) == [("call00001",), ("call00001", "a"), (None, None)]
    named = [a | {"id": "x"}, b, a | {"id": "y"}]
    assert results(named, {"tool_call_id": "y"}, {}, {}) == [("x", "call00002", "y"), ("y", None), ("x", "a"), ("call00002", "b")]
    assert results(named, {"tool_call_id": "z"}, {}) == [("x", "call00002", "y"), ("z", None), ("call00002", "b")]


def test_ids_count_on_through_a_conversation():
    for result in ([], [{"role": "tool", "content": "x"}]):
        steps = [[{"role": "assistant", "tool_calls": [{"name": name}]}, *result] for name in "abc"]
        messages = to_conversation([*chat("q"), *itertools.chain(*steps)]).messages
        ids = [call["id"] for message in messages for call in message.get("tool_calls", ())]
        assert ids == ["call00001", "call00002", "call00003"]  # nine letters and digits: some templates take no others
        assert [message["tool_call_id"] for message in messages if message["role"] == "tool"] == ids[:3 * len(result)]


# ---------------------------------------------------------------------------------------------------------------------
# Any row at all


def check_unchanged(row: object) -> None:
    """to_conversation must not change its row, and what it returns may be changed without changing that."""
    before = copy.deepcopy(row)
    for answered in (True, False):
        try:
            conversation = to_conversation(row, answered)
        except ValueError as error:
            assert str(error)
            continue
        assert row == before
        for message in conversation.messages:
            assert {"role", "content", "train"} <= set(message) <= {
                "role", "content", "train", "reasoning_content", "tool_calls", "tool_call_id", "name"}
            assert message["role"] in {"system", "developer", "user", "assistant", "tool"}
            texts = [message[key] for key in set(message) - {"train", "tool_calls"}]
            assert all(type(text) is str for text in texts) and message["train"] in (1, 0)
            for each in message.pop("tool_calls", ()):
                assert type(each["id"]) is str and each["type"] == "function" and set(each["function"]) == {"name", "arguments"}
                each["function"].clear()
                each.clear()
            message.clear()
        conversation.tools.clear()
    assert row == before


@pytest.mark.parametrize("whole", [*SHAPES.values(), *({"messages": [*chat("q"), form, {"role": "tool", "content": {"a": 1}}],
                                                        "tools": [AS_TOOL, LOOK_UP]} for form in FORMS.values())])
def test_a_row_is_not_changed(whole):
    to_conversation(whole)
    check_unchanged(whole)


def test_a_row_with_everything_is_not_changed():
    parts = [{"type": "text", "text": "x"}, {"type": "thinking", "thinking": "hm"}]
    everything = {"role": "assistant", "content": parts, "reasoning": "hm", "weight": 0, "loss": None, "images": [], "name": "n",
                  "function_call": {"name": "f", "arguments": "{}"}, "tool_calls": [], "date": 1}
    whole = {"prompt": [*chat("q"), everything], "completion": [everything], "history": [["q", "a"]], "system": "s",
             "chosen": None, "label": "", "functions": [LOOK_UP], "skill": "add", "source": "web"}
    assert len(to_conversation(whole).messages) == 6
    check_unchanged(whole)


LEAVES = st.none() | st.booleans() | st.integers(-1, 2) | st.floats() | st.sampled_from(
    ["", "text", "[]", "{}", "null", "5", '[["q", "a"]]', '{"name": "f"}', "\ud800", "user", "gpt", "function_call", "tool"])
MESSAGE_KEYS = [*rows_module.ROLE, *rows_module.CONTENT, *rows_module.THOUGHT, "train", "loss", "weight", "tool_calls",
                "function_call", "tool_call_id", "name", "images", "type", "function", "arguments", "parameters", "id"]
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
    st.sampled_from(MESSAGE_KEYS), inner, max_size=4), max_leaves=8)
A_MESSAGE = st.builds(lambda role, content, more: more | role | content,
                      st.sampled_from([{"role": role} for role in rows_module.ROLES]), st.just({"content": "x"}) | st.just({}),
                      st.dictionaries(st.sampled_from(MESSAGE_KEYS), VALUES, max_size=2))
ROW_KEYS = [*rows_module.MESSAGES, *rows_module.QUESTION, *rows_module.INPUT, *rows_module.ANSWER, *rows_module.SYSTEM,
            *rows_module.TOOLS, "history", "text", "images", "skill", "id"]


def in_json(value: object) -> object:
    """The row as json.loads gives it: NaN, which equals nothing, is another number."""
    return json.loads(json.dumps(value).replace("NaN", "0.5").replace("-Infinity", "0.5").replace("Infinity", "0.5"))


MESSAGES = st.lists(A_MESSAGE, max_size=4)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(ROW_KEYS), VALUES | MESSAGES, max_size=5) | MESSAGES | VALUES)
def test_any_row_is_read_or_refused_and_never_changed(whole):
    check_unchanged(in_json(whole))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(make_rows(200, 1)[0], folder)
    return ChatEncoder(load_tokenizer(str(folder), str(folder)), 1024, 512)


def test_nesting_of_any_depth_is_a_bad_row_and_no_crash(tmp_path, encoder):
    """The writer of an error message has a little less of the stack left than the reader had."""
    reasons = set()
    for depth in range(500, 1000):
        file = tmp_path / "deep.jsonl"
        file.write_text('{"messages": [{"role": "user", "content": ' + "[" * depth + "]" * depth + "}]}")
        try:
            rows = list(read_rows(file))
        except DataError as error:
            assert str(error).startswith(f"{file}:1: not valid JSON at column 1: maximum recursion depth exceeded")
            reasons.add("unreadable")
            continue
        _, counts, places = encoder.encode_rows(0, file, 0, rows)
        (bad,) = [name for name in counts if name.startswith("bad: ")]
        assert (counts["rows"], counts[bad], places) == (1, 1, {bad: [0, 1]})
        reasons.add(bad)
    assert "bad: messages[0].content[0] is a part of type null; only text can be read" in reasons


def test_a_bad_row_is_counted_by_its_reason_at_its_first_line(tmp_path, encoder):
    lines = ["", json.dumps(row("add 1 and 2", "3")), '{"question": 5, "answer": "a"}', "", json.dumps(row("q", None)), "null",
             '{"question": 6, "answer": "a"}', '{"question": 5, "answer": "a"}',
             '{"prompt": "add 2 and 2", "completion": "4", "id": 1}']
    rows = list(read_rows(store(tmp_path / "x.jsonl", "\n".join(lines).encode())))
    columns, counts, places = encoder.encode_rows(3, tmp_path, 0, rows)
    assert {name: (count, places[name]) for name, count in counts.items() if name.startswith(("bad", "unread"))} == {
        "bad: question must be a text, not 5": (2, [3, 3]), "bad: messages[1].content must be a text, not null": (1, [3, 5]),
        "bad: a row must be a JSON object, not null": (1, [3, 6]), "bad: question must be a text, not 6": (1, [3, 7]),
        "unread: id": (1, [3, 9])}
    assert (counts["rows"], columns["lines"].tolist(), columns["rows"].tolist()) == (7, [2, 9], [0, 6])


# HALOs' own files: what train.sample writes is read, what train.label writes is refused, since it is judged
ASKED, ANSWERED = [{"role": "user", "content": "q"}], [{"role": "assistant", "content": "a"}]


@pytest.mark.parametrize("row, unread", [
    ({"prompt": ASKED, "output": "a", "type": "sample", "prompt_id": 0, "sample_id": 0}, {"type", "prompt_id", "sample_id"}),
    ({"instruction": "q", "output": "a", "generator": "m", "dataset": "alpacaeval_test"}, {"generator", "dataset"}),
    ({"input": ASKED, "output": ANSWERED, "type": "chat"}, {"type"}),
])
def test_halos_samples_are_read(row, unread):
    assert said(row) == [("user", "q"), ("assistant", "a")] and to_conversation(row).unread == unread


@pytest.mark.parametrize("row", [
    {"prompt": ASKED, "output": ANSWERED, "label": 1, "reward": 0.5, "type": "binary_feedback"},
    {"prompt": ASKED, "output_A": ANSWERED, "output_B": ANSWERED, "label": 0, "type": "pairwise_feedback"},
])
def test_halos_feedback_is_refused_by_name(row):
    with pytest.raises(ValueError, match="^label can't be trained on: judged answers are for KTO"):
        to_conversation(row)


@pytest.mark.parametrize("row", [{"input": ["q"], "output": ["a"]}, {"input": ASKED, "output": ["a"]}])
def test_lists_that_are_no_messages_are_refused(row):
    with pytest.raises(ValueError, match=r"^(input|output)\[0\] must be \{\"role\": ..., \"content\": ...\}"):
        to_conversation(row)


# ---------------------------------------------------------------------------------------------------------------------
# Pairs


def pair_of(row: dict) -> list[list[tuple[str, str, bool]]]:
    return [[(message["role"], message["content"], bool(message["train"])) for message in conversation.messages]
            for conversation in to_pair(row)]


def asked(question: str, *answers: str) -> list[list[tuple[str, str, bool]]]:
    return [[("user", question, False), ("assistant", answer, True)] for answer in answers]


USER = {"role": "user", "content": "q"}
GOOD_ANSWER, WORSE = ({"role": "assistant", "content": text} for text in "ab")
PAIRS = {
    "texts, TRL's standard": {"prompt": "q", "chosen": "a", "rejected": "b"},
    "messages, TRL's conversational": {"prompt": [USER], "chosen": [GOOD_ANSWER], "rejected": [WORSE]},
    "one message": {"prompt": [USER], "chosen": GOOD_ANSWER, "rejected": WORSE},
    "conversations, TRL's implicit prompt": {"chosen": [USER, GOOD_ANSWER], "rejected": [USER, WORSE]},
    "ultrafeedback_binarized": {"prompt": "q", "prompt_id": "1", "chosen": [USER, GOOD_ANSWER], "rejected": [USER, WORSE],
                                "messages": [USER, GOOD_ANSWER], "score_chosen": 8.0, "score_rejected": 2.0},
    "ShareGPT's names": {"chosen": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
                         "rejected": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "b"}]},
    "orca": {"question": "q", "chosen": "a", "rejected": "b"},
    "other names": {"instruction": "q", "chosen_response": "a", "rejected_response": "b"},
    "HALOs, A": {"prompt": [USER], "output_A": "a", "output_B": "b", "label": 1, "type": "pairwise_feedback"},
    "HALOs, B": {"prompt": [USER], "output_A": [WORSE], "output_B": [GOOD_ANSWER], "label": 0}}


@pytest.mark.parametrize("shape", PAIRS)
def test_a_pair_in_any_shape_is_two_answers_to_the_same(shape):
    row = PAIRS[shape]
    before = json.dumps(row)
    assert pair_of(row) == asked("q", "a", "b") and json.dumps(row) == before


def test_what_of_a_pair_is_not_read_is_named():
    assert [conversation.unread for conversation in to_pair(PAIRS["ultrafeedback_binarized"])] == [
        {"prompt_id", "messages", "score_chosen", "score_rejected"}] * 2
    assert to_pair(PAIRS["HALOs, A"])[0].unread == {"type"}
    assert to_pair(PAIRS["orca"])[1].unread == set()


def test_a_pair_has_what_a_row_has_around_its_answers():
    """Input, history, system message, tools, thoughts; earlier answers are not trained."""
    row = {"system": "s", "instruction": "q", "input": "i", "history": [["q0", "a0"]], "chosen": "a", "rejected": "b"}
    past = [("system", "s", False), ("user", "q0", False), ("assistant", "a0", False), ("user", "q\n\ni", False)]
    assert pair_of(row) == [[*past, ("assistant", answer, True)] for answer in "ab"]
    turns = [USER, {"role": "assistant", "content": "before"}, {"role": "user", "content": "q2"}]
    past = [("user", "q", False), ("assistant", "before", False), ("user", "q2", False)]
    pair = pair_of({"chosen": [*turns, GOOD_ANSWER], "rejected": [*turns, WORSE]})
    assert pair == [[*past, ("assistant", answer, True)] for answer in "ab"]
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}], "reasoning_content": "t"}
    good, worse = to_pair({"prompt": "q", "tools": [tool], "chosen": [call], "rejected": "b"})
    assert good.tools == worse.tools == [tool] and good.messages[-1]["reasoning_content"] == "t"
    assert good.messages[-1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {}}


def test_a_conversation_may_have_a_system_message_that_the_prompt_has_not():
    system = {"role": "system", "content": "s"}
    row = {"prompt": "q", "chosen": [system, USER, GOOD_ANSWER], "rejected": [system, USER, WORSE]}
    assert pair_of(row) == [[("system", "s", False), *messages] for messages in asked("q", "a", "b")]


@pytest.mark.parametrize("row, said", [
    ({"prompt": "q", "chosen": "a"}, r"the keys \['chosen', 'prompt'\] are no pair: chosen and rejected are"),
    ({"prompt": "q", "chosen": None, "rejected": "b"}, r"the keys \['prompt', 'rejected'\] are no pair"),
    ({"prompt": "q", "output_A": "a", "output_B": "b", "label": "B"}, 'label must be 1 where output_A is chosen, or 0, not "B"'),
    ({"prompt": "q", "completion": "a"}, r"the keys \['completion', 'prompt'\] are no pair"),
    ({"messages": [USER, GOOD_ANSWER]}, r"the keys \['messages'\] are no pair"),
    ([USER, GOOD_ANSWER], "a row must be a JSON object, not"),
    ({"chosen": "a", "rejected": "b"}, "chosen must be messages that begin with a question, or the row needs a prompt"),
    ({"chosen": [GOOD_ANSWER], "rejected": [WORSE]}, "chosen must be messages that begin with a question"),
    ({"prompt": "q", "chosen": "a", "rejected": 3}, "completion must be a text|rejected must be"),
    ({"prompt": "q", "chosen": "a", "rejected": "b", "chosen_response": "c"}, "chosen and chosen_response mean the same"),
    ({"prompt": "q", "output": "x", "chosen": "a", "rejected": "b"}, "output and completion mean the same"),
    ({"chosen": [USER, GOOD_ANSWER], "rejected": [{"role": "user", "content": "p"}, WORSE]},
     "chosen and rejected must answer the same messages"),
    ({"chosen": [USER, GOOD_ANSWER], "rejected": [USER]}, "rejected must end with an answer"),
    ({"prompt": "p", "chosen": [USER, GOOD_ANSWER], "rejected": [USER, WORSE]},
     "chosen must begin with the messages that the row asks, or be the answer to them"),
    ({"prompt": "q", "chosen": "a", "rejected": "b", "images": ["x"]}, "images can't be trained on: only text")])
def test_what_is_no_pair_is_refused_by_its_key(row, said):
    with pytest.raises(ValueError, match=said):
        to_pair(row)


@pytest.mark.parametrize("shape", [shape for shape in PAIRS if not shape.startswith("HALOs")])
def test_a_pair_is_no_row_for_supervised_training(shape):
    with pytest.raises(ValueError, match="can't be trained on: preferences are for dpo.py"):
        to_conversation(PAIRS[shape])
