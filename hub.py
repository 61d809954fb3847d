"""Data sets by name → .jsonl files, which chat.py reads like any other. An entry is one of

    ultrachat                a name in SOURCES, below
    hub:owner/name[:split]   a data set of the Hugging Face hub whose rows have a shape that rows.py knows
    rows.parquet             a local file of such rows, or a folder of such files
    chats.jsonl              any other local file or folder, as it is
with a weight if wanted: `chats.jsonl*2` trains on each row twice an epoch, `shp*0.5` on half of the rows. What is there by the
whole of that name is meant first: `a*2.jsonl` may be a file. One with a comma is put in quotes, 'datasets=["a,b.jsonl"]'.

What is fetched is written once, to {cache_dir}/datasets/; delete the file there to have it fetched anew.
"""

import difflib
import fcntl
import hashlib
import importlib.util
import json
import math
import os
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from script import RunError, one_line, timed

CONTROL_TOKENS = ("<|good|>", "<|bad|>")  # as in HALOs; to be tokens of the tokenizer, or else they are spelt out


class HubError(RunError, ValueError):
    """A data set that can't be had: one line that names it and says what would be right."""


# ---------------------------------------------------------------------------------------------------------------------
# Converters: a row as it is on the hub → [conversation], or [the one with the better answer, the one with the worse]


def ask(question: str, *answers: str) -> list[list[dict]]:
    return [[{"role": "user", "content": question}, {"role": "assistant", "content": answer}] for answer in answers]


def plain(messages: list[dict]) -> list[dict]:
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def convert_ultrachat(row: dict) -> list[list[dict]]:
    return [plain(row["messages"])]


def convert_ultrabin(row: dict) -> list[list[dict]]:
    return [plain(row["chosen"]), plain(row["rejected"])]


def convert_hh(row: dict) -> list[list[dict]]:
    conversations = []
    for text in (row["chosen"], row["rejected"]):
        _, *parts = re.split(r"\n\n(Human|Assistant):", text)
        conversations.append([{"role": "user" if speaker == "Human" else "assistant", "content": said.strip()}
                              for speaker, said in zip(parts[::2], parts[1::2])])
    return conversations


def convert_shp(row: dict) -> list[list[dict]]:
    a, b = row["human_ref_A"], row["human_ref_B"]
    return ask(row["history"], *((a, b) if row["labels"] == 1 else (b, a)))


def convert_safe_rlhf(row: dict) -> list[list[dict]]:
    better = row["better_response_id"]
    return ask(row["prompt"], row[f"response_{better}"], row[f"response_{1 - better}"])


def convert_oasst(row: dict) -> list[list[dict]]:
    """Takes a row of `find_threads`. Replies between the best and the worst are left out: if each is compared with its
    neighbours, as in HALOs, they are bad answers and good ones at once."""
    history = [{"role": "user" if message["role"] == "prompter" else "assistant", "content": message["text"]}
               for message in row["thread"]]
    return [[*history, {"role": "assistant", "content": reply}] for reply in row["replies"][:1] + row["replies"][1:][-1:]]


def convert_s1k(row: dict) -> list[list[dict]]:
    """Marks the thought as its author, DeepSeek-R1, does: HALOs' <|im_start|> is a control token of many models."""
    thought, answer = row["deepseek_thinking_trajectory"].strip(), row["deepseek_attempt"].strip()
    return ask(row["question"], f"<think>\n{thought}\n</think>\n\n{answer}")


def convert_alpacaeval(row: dict) -> list[list[dict]]:
    return ask(row["instruction"], row["output"])


def convert_wildbench(row: dict) -> list[list[dict]]:
    return [[*plain(row["conversation_input"]), {"role": "assistant", "content": row["references"]["gpt-4"]}]]


# ---------------------------------------------------------------------------------------------------------------------
# What needs more than one row: (rows of the hub, "train" or "test") → rows for a converter


def find_threads(rows: Sequence[dict], split: str) -> Iterator[dict]:
    """The messages of oasst, one a row → {"thread": messages from the first to a question, "replies": texts, best first}.

    In English and with ranked replies, as in HALOs; a thread of which a message is not there is empty.
    """
    messages = {row["message_id"]: row for row in rows if row["lang"] == "en"}
    ranked = defaultdict(list)
    for message in messages.values():
        if message["role"] == "assistant" and message["rank"] is not None:
            ranked[message["parent_id"]].append(message)
    for replies in ranked.values():
        thread, parent = [], replies[0]["parent_id"]
        while parent in messages:
            thread.insert(0, messages[parent])
            parent = messages[parent]["parent_id"]
        replies.sort(key=lambda reply: reply["rank"])
        yield {"thread": [] if parent else thread, "replies": [reply["text"] for reply in replies]}


def select_shp(rows: Sequence[dict], split: str) -> Iterable[dict]:
    """To train: pairs of which one has at least twice the other's score, and at most 5 of a post, as in HALOs."""
    if split != "train":
        return rows
    of_post = defaultdict(list)
    for i, row in enumerate(rows):
        low, high = sorted((row["score_A"], row["score_B"]))
        if high >= 2 * low:
            of_post[row["history"]].append(i)
    kept = [i for pairs in of_post.values() for i in random.Random(0).sample(pairs, min(5, len(pairs)))]
    return (rows[i] for i in sorted(kept))


# ---------------------------------------------------------------------------------------------------------------------
# The table


@dataclass(frozen=True)
class Source:
    repo: str  # on the Hugging Face hub
    splits: dict[str, str]  # "train" and "test" → what the repository calls them
    convert: Callable[[dict], list[list[dict]]]
    select: Callable[[Sequence[dict], str], Iterable[dict]] = lambda rows, split: rows
    last_only: bool = False  # only the last answer is trained: those before it in the conversation were never judged
    options: dict[str, str] = field(default_factory=dict)  # of datasets.load_dataset; data_files is within the repository


BOTH = {"train": "train", "test": "test"}
SOURCES = {
    "ultrachat": Source("HuggingFaceH4/ultrachat_200k", {"train": "train_sft", "test": "test_sft"}, convert_ultrachat),
    "ultrabin": Source("HuggingFaceH4/ultrafeedback_binarized", {"train": "train_prefs", "test": "test_prefs"},
                       convert_ultrabin, last_only=True),
    "oasst": Source("OpenAssistant/oasst1", {"train": "train", "test": "validation"}, convert_oasst, find_threads, True),
    "shp": Source("stanfordnlp/SHP", BOTH, convert_shp, select_shp, True),
    "hh": Source("Anthropic/hh-rlhf", BOTH, convert_hh, last_only=True),
    "hh_helpful": Source("Anthropic/hh-rlhf", BOTH, convert_hh, last_only=True, options={"data_dir": "helpful-base"}),
    "hh_harmless": Source("Anthropic/hh-rlhf", BOTH, convert_hh, last_only=True, options={"data_dir": "harmless-base"}),
    "safe_rlhf": Source("PKU-Alignment/PKU-SafeRLHF-single-dimension", BOTH, convert_safe_rlhf, last_only=True),
    "s1k": Source("simplescaling/s1K-1.1", {"train": "train"}, convert_s1k),
    # Its repository is a script, which `datasets` no longer runs, so its file is read: a file has but the split "train".
    "alpacaeval": Source("tatsu-lab/alpaca_eval", {"test": "train"}, convert_alpacaeval,
                         options={"data_files": "alpaca_eval.json"}),
    "wildbench": Source("allenai/WildBench", {"test": "test"}, convert_wildbench, last_only=True, options={"name": "v2"}),
}
PAIRS = ("ultrabin", "oasst", "shp", "hh", "hh_helpful", "hh_harmless", "safe_rlhf")  # those with two answers to compare


# ---------------------------------------------------------------------------------------------------------------------
# Entry → file


@timed("data")
def fetch(entry: str, split: str, cache_dir: str, form: str = "", root: str = "") -> str:
    """Returns the path of a .jsonl file with the rows of `entry`, which has no weight here; or a local path as it is.

    split        "train" or "test"; it goes for names, and for hub:owner/name
    form         of names alone, whose better answers are taken else.
                 "conditional": conditional SFT (Korbak et al. 2023): answers begin with the good token, and the worse of two
                 compared answers is a row too, with the bad one. As in HALOs, the token is a target like the answer.
                 "pairs": a row has the "chosen" and the "rejected" one, of rows whose answers are compared
    root         a folder in which to find owner/name, instead of the hub
    All ranks may call it: one writes, the others wait. Raises HubError.
    """
    if os.path.exists(entry) and not entry.endswith(".parquet"):
        return entry
    if entry in SOURCES:
        if split not in SOURCES[entry].splits:
            raise HubError(f"{entry} has no {split} split, only {', '.join(SOURCES[entry].splits)}")
        if form == "pairs" and entry not in PAIRS:
            raise HubError(f"{entry} has no rejected answers; of the data sets by name {', '.join(PAIRS)} have")
        name, rows = "-".join(filter(None, (entry, split, form))), convert_rows(entry, split, form, root)
    elif entry.startswith("hub:"):
        match = re.fullmatch(r"hub:([\w.-]+/[\w.-]+)(?::([\w.-]+))?", entry)
        if not match:
            raise HubError(f"{entry}: must be hub:owner/name or hub:owner/name:split")
        repo, split = match[1], match[2] or split
        name, rows = f"{repo.replace('/', '--')}-{split}", raw_rows(entry, os.path.join(root, repo), split)
    elif entry.endswith(".parquet"):
        files = [entry]
        if os.path.isdir(entry):
            files = sorted(str(file) for file in Path(entry).rglob("*.parquet") if file.is_file())
        if not files or not os.path.exists(files[0]):
            raise HubError(f"{entry}: no such file" if files else f"{entry}: no .parquet file in this folder")
        if errors := [f"{file}: not a parquet file" for file in files if not is_parquet(file)]:
            raise HubError("\n".join(errors))
        stamps = [(os.path.realpath(file), os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in files]
        name = f"{Path(entry).stem}-{hashlib.sha256(repr(stamps).encode()).hexdigest()[:12]}"
        rows = raw_rows(entry, "parquet", "train", data_files=files)
    else:
        refuse_unknown(entry)
        return entry  # meant as a path, of which chat.py says what is wrong
    path = Path(cache_dir, "datasets", f"{name}.jsonl")
    write_once(path, rows)
    return str(path)


def is_parquet(file: str) -> bool:
    """Whether the file begins and ends as these files do; of a pipe or a device nothing is read."""
    if not os.path.isfile(file):
        return False
    try:
        with open(file, "rb") as stream:
            begins = stream.read(4)
            stream.seek(max(0, os.path.getsize(file) - 4))
            return begins == stream.read(4) == b"PAR1" and os.path.getsize(file) > 8
    except OSError as error:
        raise HubError(f"{file}: can't be read: {error.strerror}") from error


def check_access(config) -> list[str]:
    """Returns a line for whatever keeps a configuration's models and data sets from being had: no network, no access, no package.

    Asked before anything is downloaded, and before torch is imported. What is on the disk already needs nothing.
    """
    model, errors, wanted = config.model, [], {}  # {(kind, repository): the key that may name a file or a folder instead}
    if not (model.tokenizer_name_or_path and (model.load_from or model.random_init)):
        wanted["model", model.name_or_path] = "model.name_or_path=FOLDER"
    wanted.setdefault(("model", model.tokenizer_name_or_path), "model.tokenizer_name_or_path=FOLDER")
    wanted = {(kind, name): instead for (kind, name), instead in wanted.items() if name and not os.path.isdir(name)}
    for key in ("datasets", "eval_datasets"):
        for entry in getattr(config, key):
            try:
                if repo := repository_of(parse_weight(entry)[0], config.cache_dir):
                    wanted.setdefault(("dataset", repo), f"{key}=[FILE]")
            except HubError as error:
                errors.append(str(error))
    if any(kind == "dataset" for kind, _ in wanted) and not importlib.util.find_spec("datasets"):
        errors.append("data sets by name need the datasets package: pip install datasets; or have files, datasets=[FILE]")
    problems = {}
    for (kind, repo), instead in wanted.items():
        if problem := access_problem(kind, repo, config.cache_dir):
            problems.setdefault(problem, {})[repo] = instead
    return errors + [f"{' and '.join(found)}: {problem}; or have it on the disk: {' '.join(dict.fromkeys(found.values()))}"
                     for problem, found in problems.items()]


def repository_of(name: str, cache_dir: str) -> str:
    """Returns owner/name of the hub if that is where a data set is to come from, or "". Raises HubError for unknown names."""
    if os.path.isfile(name) and name in SOURCES:
        raise HubError(f"{name} is a data set by name and a file here: give the file another name, {name}.jsonl if it holds rows")
    if os.path.exists(name):
        return ""
    if name not in SOURCES and not name.startswith("hub:"):
        return refuse_unknown(name)
    repo = SOURCES[name].repo if name in SOURCES else name.removeprefix("hub:").partition(":")[0]
    stem = name.removeprefix("hub:").replace("/", "--").replace(":", "-")
    fetched = [*Path(cache_dir, "datasets").glob(f"{stem}-*.jsonl"), *Path(cache_dir, "datasets").glob(f"{stem}.jsonl")]
    return "" if fetched or os.path.isdir(repo) else repo


def refuse_unknown(name: str) -> str:
    """Returns "" for what is meant as a path; raises HubError for what is meant as a name."""
    if os.sep in name or "." in name:
        return ""
    near = difflib.get_close_matches(name, SOURCES, 1, cutoff=0)[0]
    raise HubError(f"unknown data set {name!r}, did you mean {near!r}? Known are {', '.join(SOURCES)}, hub:owner/name, and local "
                   "files and folders")


def access_problem(kind: str, repo: str, cache_dir: str) -> str:
    """Returns why a repository of the hub can't be read and what to do, or "" where it can."""
    import huggingface_hub
    from huggingface_hub import errors, utils
    try:
        file, cache = ("config.json", cache_dir) if kind == "model" else ("README.md", None)
        if huggingface_hub.try_to_load_from_cache(repo, file, cache, repo_type=kind):
            return ""
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            return "not in the cache, and HF_HUB_OFFLINE is set"
        # As HfApi.auth_check does, which waits as long as the network pleases
        answer = utils.get_session().get(f"{huggingface_hub.constants.ENDPOINT}/api/{kind}s/{repo}/auth-check",
                                         headers=utils.build_hf_headers(), timeout=10)
        utils.hf_raise_for_status(answer)
    except errors.GatedRepoError:
        page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{repo}"
        return f"no access yet: accept its licence at {page}, then hf auth login"
    except errors.RepositoryNotFoundError:
        return "no such folder, and the hub shows none of this name: see to its spelling, or hf auth login if it is private"
    except errors.HFValidationError:
        return "no such folder, and no name as the hub's are"
    except errors.HfHubHTTPError as error:
        return f"the hub refuses: {one_line(error)}"
    except Exception as error:  # the library that speaks to the network has errors of its own
        return f"the hub can't be reached, is there a network? ({type(error).__name__})"
    return ""


def write_once(path: Path, rows: Iterator[dict]) -> None:
    """Writes a row a line, under another name until the file is whole; does nothing if it is there already."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if path.exists():
                return
            partial = path.with_suffix(".partial")
            try:
                with open(partial, "w", encoding="utf-8") as out:
                    out.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
                    out.flush()
                    os.fsync(out.fileno())
                partial.rename(path)
            finally:  # where a row can't be read or written
                partial.unlink(missing_ok=True)
    except OSError as error:
        raise HubError(f"{path}: can't be written: {error.strerror}") from error


def load(entry: str, path: str, split: str, **options) -> Sequence[dict]:
    """datasets.load_dataset, but whatever goes wrong is a HubError."""
    try:
        import datasets
    except ImportError as error:
        raise HubError(f"{entry} needs the datasets package: pip install datasets ({error})") from error
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)  # what it logs of an error, the HubError says too
    try:
        return datasets.load_dataset(path, split=split, **options)
    except Exception as error:  # network, authorisation, disk and format all raise errors of their own
        text = f"{entry}: can't be loaded: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if isinstance(error, ConnectionError) and datasets.config.HF_HUB_OFFLINE:
            text += "; HF_HUB_OFFLINE is set: fetch it once without that, or choose a local file"
        raise HubError(text) from error


def raw_rows(entry: str, path: str, split: str, **options) -> Iterator[dict]:
    yield from map(drop_nulls, load(entry, path, split, **options))


def drop_nulls(value):
    """Undoes what a table does to rows: a key that one of them lacks is null there."""
    if isinstance(value, dict):
        return {key: drop_nulls(item) for key, item in value.items() if item is not None}
    return [drop_nulls(item) for item in value] if isinstance(value, list) else value


def convert_rows(name: str, split: str, form: str, root: str) -> Iterator[dict]:
    """Yields {"messages": [...]} of a data set in SOURCES, or pairs, as fetch's `form` says; prints how many."""
    source, seen, counts = SOURCES[name], set(), Counter()
    path, options = os.path.join(root, source.repo), source.options
    if "data_files" in options:
        path, options = "json", {"data_files": os.path.join(root or "hf://datasets", source.repo, options["data_files"])}
    for i, row in enumerate(source.select(load(name, path, source.splits[split], **options), split)):
        try:
            conversations = source.convert(row)
        except (KeyError, TypeError, AttributeError) as error:
            raise HubError(f"{name}: row {i} of {source.repo} is not of the form that hub.py knows: {error!r}") from error
        tokens = CONTROL_TOKENS if form == "conditional" else ("", "")
        rows = [clean(conversation, source.last_only, token) for conversation, token in zip(conversations, tokens)]
        rows = [{"messages": messages} if messages else {} for messages in (rows if form else rows[:1])]
        if form == "pairs":
            whole = len(rows) == 2 and all(rows)
            rows = [{"chosen": rows[0]["messages"], "rejected": rows[1]["messages"]} if whole else {}]
        for row in rows:
            key = hashlib.sha256(repr(row).encode()).digest()  # a good answer is in as many pairs as it was compared in
            counts["misfits" if not row else "repeated" if key in seen else "written"] += 1
            if row and key not in seen:
                yield row
            seen.add(key)
    what = "are no pair of answers" if form == "pairs" else "are no exchange of questions and answers"
    print(f"{name}, {split}: {counts['written']} rows of {source.repo}; dropped: {counts['misfits']} that {what}, "
          f"{counts['repeated']} repeated")
    if not counts["written"]:
        raise HubError(f"{name}: no row of {source.repo} is left")


def clean(messages: list[dict], last_only: bool, token: str) -> list[dict]:
    """Returns the messages up to the last answer, or [] if chat.py would refuse them or that answer is empty.

    `last_only` takes the other answers out of the loss; `token` comes in front of those that are in it.
    """
    while messages and messages[-1]["role"] == "user":
        messages = messages[:-1]
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    texts = all(isinstance(message["content"], str) for message in messages)
    if not turns or turns != ["user", "assistant"] * (len(turns) // 2) or not texts or not messages[-1]["content"].strip():
        return []
    cleaned = []
    for i, message in enumerate(messages, 1):
        if message["role"] == "assistant":
            untrained = last_only and i < len(messages)
            message = {**message, "train": False} if untrained else {**message, "content": token + message["content"]}
        cleaned.append(message)
    return cleaned


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def parse_weight(entry: str) -> tuple[str, float]:
    """"chats.jsonl*2" → ("chats.jsonl", 2.0); the weight is 1 where none is given. Raises HubError."""
    if os.path.exists(entry):  # a file's own name may have a star
        return entry, 1.0
    name, star, text = entry.rpartition("*")
    try:
        weight = float(text) if star else 1.0
    except ValueError:
        weight = math.nan
    if star and not (name and 0 < weight <= 1000):  # each row is listed so many times
        raise HubError(f"{entry!r}: the weight after * must be a number above 0 and up to 1000, as in chats.jsonl*2 or shp*0.5")
    return (name, weight) if star else (entry, weight)
