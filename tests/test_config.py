"""The configuration: what a config file and the command line make of it, and what is said where they are wrong."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import make_tiny
from configs.base import (
    ABOVE_0,
    ANY,
    COUNT,
    COUNT_OR_0,
    DTYPE,
    FEW,
    FIXED,
    FRACTION,
    FREE,
    LENGTH,
    MINUTES,
    MOVED,
    NOT_NEGATIVE,
    SEED,
    Config,
    ConfigError,
    DPOConfig,
    brief,
    changes,
    check,
    default_of,
    get_key,
    knob,
    knobs,
    load_config,
    set_key,
    usage,
)

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(path for path in ROOT.glob("configs/*.py") if path.name != "base.py")
TINY = str(ROOT / "configs/tiny.py")


@pytest.fixture(autouse=True)
def files(tmp_path_factory, monkeypatch) -> Path:
    """The folder that each test is in, with the files of rows that the configurations name."""
    folder = tmp_path_factory.mktemp("files")
    (folder / ".cache/tiny-data").mkdir(parents=True)
    for name in (".cache/tiny-data/train.jsonl", *(f".cache/tiny-data/{name}.jsonl" for name in ("test", "pairs", "test-pairs")),
                 "a.jsonl", "b c.json", "x.jsonl", "z.jsonl"):
        (folder / name).touch()
    monkeypatch.chdir(folder)
    return folder


def load(*overrides: str, world_size: int = 1) -> Config:
    return load_config(["--config", TINY, *overrides], world_size)


def errors_of(*argv: str, world_size: int = 1) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        load_config(list(argv), world_size)
    return str(raised.value).splitlines()


def errors(*overrides: str, world_size: int = 1) -> list[str]:
    return errors_of("--config", TINY, *overrides, world_size=world_size)


@pytest.fixture
def config_file(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "mine.py"
        path.write_text("from configs.base import Config, ModelConfig\n" + text)
        return str(path)
    return write


# ---------------------------------------------------------------------------------------------------------------------
# What is read


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("world_size", [1, 4])
def test_every_config_file_loads_and_names_its_own_command(file, world_size):
    config = load_config(["--config", str(file), "datasets=[x.jsonl]"], world_size, None, Config, DPOConfig)
    assert config.datasets == ["x.jsonl"] and config.exp_name
    assert f"--config configs/{file.name}" in file.read_text()


def test_the_contract_names_these_defaults():
    config = Config()
    expected = {
        "lr": 5e-6, "n_epochs": 1, "n_examples": None, "model.batch_size": 32, "model.gradient_accumulation_steps": 1,
        "model.max_grad_norm": 1.0, "model.use_peft": False, "model.peft.lora_r": 64, "model.peft.lora_alpha": 256,
        "model.peft.lora_dropout": 0.05, "model.peft.target_modules": "all-linear", "model.load_from": "",
        "model.from_checkpoint": "", "model.load_lora_from": "", "weight_decay": 0.01, "beta1": 0.9, "beta2": 0.999,
        "eps": 1e-8, "warmup": 0.10, "seed": 1, "n_eval_examples": 256, "do_first_eval": True, "wandb.enabled": False,
        "intermediate_checkpoints": False, "cache_dir": ".cache"}
    assert {key: get_key(config, key) for key in expected} == expected


@pytest.mark.parametrize("prefix", ["", "++", "--", "+"])
@pytest.mark.parametrize("override, expected", [
    ("seed=7", 7), ("seed=0", 0), ("n_examples=100", 100), ("n_examples=null", None),
    ("lr=1e-5", 1e-5), ("lr=2", 2.0), ("model.peft.lora_alpha=16", 16.0),
    ("do_first_eval=false", False), ("model.packing=False", False), ("wandb.enabled=true", True),
    ("exp_name=a=b c", "a=b c"), ("exp_name=ünï", "ünï"),
    ("datasets=[a.jsonl]", ["a.jsonl"]), ("datasets=[a.jsonl, 'b c.json']", ["a.jsonl", "b c.json"]),
    ("datasets=a.jsonl", ["a.jsonl"]), ("eval_datasets=[]", []),
    ("model.peft.target_modules=all-linear", "all-linear"), ("model.peft.target_modules=[q_proj,v_proj]", ["q_proj", "v_proj"]),
    ('model.random_init={"model_type": "llama", "rope": {"theta": 1e4}}', {"model_type": "llama", "rope": {"theta": 1e4}}),
])
def test_an_override_is_read_as_the_type_of_its_key(prefix, override, expected):
    value = get_key(load(prefix + override, "model.use_peft=true"), override.partition("=")[0])
    assert value == expected and type(value) is type(expected)


def test_null_takes_a_value_away():
    assert load("model.random_init=null", "model.name_or_path=gpt2").model.random_init is None


def test_the_config_file_can_be_given_in_every_way():
    argvs = [["--config", TINY], [f"--config={TINY}"], [f"config={TINY}"], ["seed=3", "--config", TINY]]
    assert [load_config([*argv, "lr=0.5", "lr=0.5"], 1).lr for argv in argvs] == [0.5] * 4
    assert load_config(argvs[-1], 1).seed == 3


def test_the_user_s_folder_is_put_in_the_place_of_a_tilde(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = load("cache_dir=~/runs", "model.name_or_path=~/llama", "exp_name=a~")
    assert (config.cache_dir, config.model.name_or_path, config.exp_name) == ("/home/me/runs", "/home/me/llama", "a~")
    assert errors("datasets=[~/gone.jsonl]") == ["datasets: /home/me/gone.jsonl: no such file"]


def test_nothing_is_shared_between_two_configs(config_file):
    one, two = Config(), Config()
    one.datasets.append("a.jsonl")
    one.model.peft.lora_r = 1
    assert two == Config() and two.datasets == [] and two.model.peft.lora_r == 64

    before = load()
    changed = load("lr=1", "model.max_length=4096", "datasets=[z.jsonl]", "model.use_peft=true", "model.peft.lora_r=2")
    changed.model.random_init["model_type"] = "gpt2"
    assert load() == before != changed

    # a file that takes over another one's config, which Python has cached
    path = config_file("from configs.llama import config\nconfig.seed = 5\n")
    first = load_config(["--config", path, "datasets=[a.jsonl]", "model.batch_size=64"], 1)
    assert (first.seed, first.model.batch_size) == (5, 64)
    assert load_config(["--config", path, "datasets=[a.jsonl]"], 1).model.batch_size == 32


# ---------------------------------------------------------------------------------------------------------------------
# Knobs: what is said of each on its line in configs/base.py, and what follows from it

KNOBS = [*knobs(Config)]
each_knob = pytest.mark.parametrize("key, item", [(key, item) for key, (item, _) in KNOBS], ids=[key for key, _ in KNOBS])
BOUNDS = [ANY, DTYPE, ABOVE_0, NOT_NEGATIVE, FRACTION, COUNT, COUNT_OR_0, FEW, LENGTH, SEED, MINUTES]
HUGE = [10 ** 24, 10 ** 400]
OUTSIDE = {ABOVE_0: [0, -1, 1e-300, 1e300], NOT_NEGATIVE: [-1, -0.01, 1e300], FRACTION: [-0.01, 1, 2], ANY: [],
           DTYPE: ["fp32", "int8"], COUNT: [0, -1, *HUGE], COUNT_OR_0: [-1, *HUGE],
           FEW: [0, -1, 10 ** 12, *HUGE], LENGTH: [1, 0, *HUGE],
           SEED: [-1, 2 ** 63, 2 ** 70, *HUGE], MINUTES: [0, -1, 1e-12, 1e10, 1e300]}
INSIDE = {ABOVE_0: [1e-9, 1, 10 ** 6], NOT_NEGATIVE: [0, 1, 0.01, 10 ** 6], FRACTION: [0, 0.5, 0.999], ANY: [],
          DTYPE: ["", "float32", "bfloat16", "float16"], COUNT: [1, 10 ** 12], COUNT_OR_0: [0, 1, 10 ** 12],
          FEW: [1, 10 ** 6], LENGTH: [2, 10 ** 12],
          SEED: [0, 2 ** 63 - 1], MINUTES: [0.01, 30, 10 ** 6]}


def complete(**values) -> Config:
    """A configuration in which nothing is wrong."""
    config = Config(exp_name="a", datasets=["a.jsonl"])
    config.model.name_or_path = "b"
    for key, value in values.items():
        set_key(config, key, value)
    assert check(config, 1) == []
    return config


@pytest.mark.parametrize("missing", ["default", "bounds", "may_change", "meaning"])
def test_a_knob_can_t_be_made_without_saying_all_of_it(missing):
    parts = {"default": 1, "bounds": ABOVE_0, "may_change": FIXED, "meaning": "so many"}
    assert dict(knob(**parts).metadata) == {"bounds": ABOVE_0, "may_change": FIXED, "meaning": "so many"}
    del parts[missing]
    with pytest.raises(TypeError, match=missing):
        knob(**parts)


def test_every_field_of_the_configuration_is_a_knob_or_holds_knobs():
    def fields(config, prefix=""):
        for item in dataclasses.fields(config):
            value = getattr(config, item.name)
            yield from fields(value, f"{prefix}{item.name}.") if dataclasses.is_dataclass(value) else [prefix + item.name]

    assert [key for key, _ in KNOBS] == [*fields(Config())] and len(KNOBS) > 50


@each_knob
def test_every_knob_says_its_bounds_whether_it_may_change_and_what_it_means(key, item):
    assert item.metadata.keys() == {"bounds", "may_change", "meaning"}
    (_, holds), meaning = item.metadata["bounds"], item.metadata["meaning"]
    assert item.metadata["bounds"] in BOUNDS and item.metadata["may_change"] in (FIXED, MOVED, FREE)
    assert len(meaning) > 5 and "\n" not in meaning and not meaning.endswith(".")
    default = default_of(item)
    assert default is None or holds(default) and get_key(Config(), key) == default


@each_knob
def test_a_value_out_of_a_knob_s_bounds_is_refused_and_one_within_is_not(key, item):
    bounds, config = item.metadata["bounds"], complete()
    number = float if isinstance(default_of(item), float) else int
    number = str if isinstance(default_of(item), str) else number
    for value in {number(value) for value in (*OUTSIDE[bounds], *INSIDE[bounds]) if number(value) == value}:
        set_key(config, key, value)
        assert (f"{key}={brief(value)} must be {bounds[0]}" in check(config, 1)) == (value in OUTSIDE[bounds])


@pytest.mark.parametrize("key", [key for key, (_, hint) in KNOBS if hint in (int, int | None)])
@pytest.mark.parametrize("digits", [25, 400, 5000])
def test_a_number_of_many_digits_is_told_in_one_short_line(config_file, key, digits):
    """Typed, and in a file."""
    path = config_file(f"import copy\nimport configs.tiny\nconfig = copy.deepcopy(configs.tiny.config)\n"
                       f"config.{key} = 10 ** {digits}\n")
    switch = ["model.use_peft=true"] * key.startswith("model.peft.")
    for (error,) in errors(f"{key}={'9' * digits}", *switch), errors_of("--config", path):
        assert error.startswith(f"{key}=") and len(error) < 150


def test_a_number_has_bounds():
    assert not [key for key, (item, hint) in KNOBS if hint in (int, float, int | None) and item.metadata["bounds"] == ANY]


@each_knob
def test_a_resumed_run_may_change_a_knob_if_it_says_so(key, item):
    then, now = dataclasses.asdict(complete()), complete()
    before = get_key(now, key)
    after = {bool: lambda: not before, str: lambda: f"{before}x", list: lambda: [*before, "x"], int: lambda: before + 1,
             float: lambda: before + 0.5, type(None): lambda: 7}[type(before)]()
    set_key(now, key, after)
    now, may_change = dataclasses.asdict(now), item.metadata["may_change"]
    line = [f"{key}: {before!r} then, {after!r} now"]
    assert changes(then, now) == line * (may_change == FIXED)
    assert changes(then, now, moved=True) == line * (may_change in (FIXED, MOVED))
    assert changes(now, now) == []


def test_what_a_step_computes_is_fixed_and_how_far_and_how_fast_a_run_goes_is_not():
    may_change = {key: item.metadata["may_change"] for key, (item, _) in KNOBS}
    fixed = ["lr", "warmup", "seed", "weight_decay", "beta1", "beta2", "eps", "eval_fraction", "conditional", "last_answer_only",
             "model.chat_template", "model.template_kwargs", "model.batch_size", "model.max_length", "model.max_prompt_length",
             "model.max_grad_norm", "model.use_peft",
             *(key for key in may_change if key.startswith("model.peft."))]
    moved = ["datasets", "eval_datasets", "model.name_or_path", "model.tokenizer_name_or_path", "model.load_from",
             "model.load_lora_from"]
    free = ["n_epochs", "n_examples", "max_bad_rows", "eval_every", "save_every", "cache_dir", "exp_name", "model.replicas",
            "model.microbatch_tokens", "model.gradient_accumulation_steps", "model.packing", "model.compile"]
    assert all(may_change[key] == how for keys, how in ((fixed, FIXED), (moved, MOVED), (free, FREE)) for key in keys)
    assert {key for key in may_change if may_change[key] == MOVED} == {*moved}


def test_a_key_that_an_older_checkpoint_has_not_counts_as_its_default():
    then = dataclasses.asdict(complete())
    del then["beta1"], then["model"]["peft"]["lora_r"], then["model"]["random_init"], then["wandb"]
    assert changes(then, dataclasses.asdict(complete())) == []
    now = complete(**{"beta1": 0.5, "model.use_peft": True, "model.peft.lora_r": 8})
    now = dataclasses.asdict(now)
    assert changes(then, now) == ["beta1: 0.9 then, 0.5 now", "model.use_peft: False then, True now",
                                  "model.peft.lora_r: 64 then, 8 now"]
    del then["model"]["peft"]
    assert changes(then, now)[2:] == ["model.peft.lora_r: 64 then, 8 now"]


# ---------------------------------------------------------------------------------------------------------------------
# What is wrong: each error is one line, that names the key


@pytest.mark.parametrize("key, meant", [
    ("sed", "seed"), ("model.batchsize", "model.batch_size"), ("batch_size", "model.batch_size"),
    ("lora_r", "model.peft.lora_r"), ("max_lenght", "model.max_length"), ("dataset", "datasets"),
    ("wandb.enable", "wandb.enabled"), ("modle.name_or_path", "model.name_or_path"),
])
def test_a_misspelt_key_is_answered_with_the_nearest(key, meant):
    assert errors(f"++{key}=1") == [f"unknown key {key!r}, did you mean {meant!r}?"]


@pytest.mark.parametrize("key", ["zzz", "", "model", "model.zzz.zzz"])
def test_a_key_like_no_other_is_answered_with_where_they_are_listed(key):
    (error,) = errors(f"{key}=1")
    assert error.startswith(f"unknown key {key!r}")
    assert key or "--help" in error


@pytest.mark.parametrize("override, expected", [
    ("seed=1.5", "an integer"), ("seed=", "an integer"), ("seed=null", "an integer"), ("n_examples=ten", "an integer or null"),
    ("lr=fast", "a number"), ("lr=nan", "a number"), ("lr=inf", "a number"), ("lr=true", "a number"),
    ("do_first_eval=1", "true or false"), ("do_first_eval=yes", "true or false"),
    ("model.random_init={broken", "a JSON object or null"), ("model.random_init=[1]", "a JSON object or null"),
    ('model.random_init={"a": ' + 20 * "[" + "}", "a JSON object or null"),
])
def test_a_value_of_the_wrong_type(override, expected):
    key, _, text = override.partition("=")
    assert errors(override) == [f"{key}={text!r} must be {expected}"]


@pytest.mark.parametrize("overrides, expected", [
    (["exp_name="], "exp_name is required"),
    (["exp_name=a/b"], "exp_name='a/b' must be a plain name"),
    (["exp_name=.."], "exp_name='..' must be a plain name"),
    (["exp_name=.a"], "exp_name='.a' must be a plain name"), (["exp_name=a "], "exp_name='a ' must be a plain name"),
    ([f"exp_name={'a' * 201}"], "exp_name='aaa"), (["cache_dir= "], "cache_dir must name a folder"),
    (["model.max_length=1", "model.max_prompt_length=null"], "model.max_length=1 must be from 2 to"),
    (["exp_name=tokens"], "exp_name=tokens is where cache_dir holds something else"),
    (["exp_name=datasets"], "exp_name=datasets is where cache_dir holds something else"),
    (["exp_name=models--gpt2"], "exp_name=models--gpt2 is where cache_dir holds something else"),
    (["exp_name=a\nb"], "exp_name='a\\nb' must be a text that can be printed"),
    (["cache_dir=a\0b"], "cache_dir='a\\x00b' must be a text that can be printed"),
    (["datasets=[a\tb]"], "datasets=['a\\tb'] must be a text that can be printed"),
    (["cache_dir="], "cache_dir must name a folder"),
    (["lr=1", "lr=2"], "lr is given twice: 1 and 2"), (["++seed=1", "seed=2"], "seed is given twice: 1 and 2"),
    (["--lr", "1e-5"], "--lr 1e-5 must be written lr=1e-5"), (["-seed", "-1"], "-seed -1 must be written seed=-1"),
    (["--lr", "lr=1"], "'--lr' is not of the form key=value"), (["lr", "warmup=0"], "'lr' is not of the form key=value"),
    (["model.peft.lora_r=8"], "model.peft.lora_r=8 needs model.use_peft=true"),
    (["model.peft.target_modules=[q_proj]"], "model.peft.target_modules=[q_proj] needs model.use_peft=true"),
    (["wandb.project=mine"], "wandb.project=mine needs wandb.enabled=true"),
    (["datasets=[]"], "datasets is required"),
    (["model.random_init=null"], "model.name_or_path is required"),
    (['model.random_init={"hidden_size": 8}'], 'model.random_init needs a "model_type"'),
    (["model.tokenizer_name_or_path="], "model.tokenizer_name_or_path is required"),
    (["lr=0"], "lr=0.0 must be above 0"), (["lr=-1"], "lr=-1.0 must be above 0"),
    (["n_epochs=0"], "n_epochs=0 must be from 1 to"), (["n_examples=0"], "n_examples=0 must be from 1 to"),
    (["model.batch_size=0"], "model.batch_size=0 must be from 1 to"),
    (["model.max_grad_norm=0"], "model.max_grad_norm=0.0 must be above 0"),
    (["model.gradient_accumulation_steps=0"], "model.gradient_accumulation_steps=0 must be from 1 to"),
    (["weight_decay=-0.1"], "weight_decay=-0.1 must be 0 or more"),
    (["warmup=1"], "warmup=1.0 must be at least 0 and below 1"), (["beta2=-1"], "beta2=-1.0 must be at least 0 and below 1"),
    (["model.max_prompt_length=64"], "model.max_prompt_length=64 must be below model.max_length=64"),
    (["eval_fraction=0.1"], "eval_datasets and eval_fraction exclude each other"),
])
def test_a_value_out_of_range(overrides, expected):
    (error,) = errors(*overrides)
    assert error.startswith(expected)


@pytest.mark.parametrize("batch_size, accumulation, world_size, divides", [
    (8, 1, 4, True), (8, 2, 4, True), (8, 4, 4, False), (6, 1, 4, False), (9, 2, 1, False), (9, 3, 3, True)])
def test_the_batch_must_be_divisible_by_ranks_and_accumulation(batch_size, accumulation, world_size, divides):
    overrides = [f"model.batch_size={batch_size}", f"model.gradient_accumulation_steps={accumulation}"]
    if divides:
        assert load(*overrides, world_size=world_size).model.batch_size == batch_size
    else:
        assert errors(*overrides, world_size=world_size) == [
            f"model.batch_size={batch_size} must be divisible by {world_size} ranks x {accumulation} accumulation steps = "
            f"{world_size * accumulation}"]


@pytest.mark.parametrize("entry", ["ultrachat", "hub:no/one:train", "a.jsonl*2", ".", "./a.jsonl*0.5", "{folder}/a.jsonl"])
@pytest.mark.parametrize("key", ["datasets", "eval_datasets"])
def test_a_data_set_s_name_is_taken_for_a_file_s_only_where_it_looks_like_one(files, key, entry):
    entry = entry.format(folder=files)
    assert getattr(load(f"{key}=[{entry}]"), key) == [entry]


def test_what_is_not_there_is_said_at_once(files):
    (files / "empty").mkdir()
    found = errors("datasets=[a.jsonl,gone.jsonl*2,gone/,ultrachat]", "eval_datasets=[gone/test.csv.gz]", "model.use_peft=true",
                   "model.load_from=gone", "model.load_lora_from=empty", "model.from_checkpoint=empty",
                   "model.chat_template=gone.jinja", 'model.template_kwargs={"tools": [], "loud": 1, "tokenize": true}', "seed=x")
    assert found == [
        "seed='x' must be an integer",
        "datasets: gone.jsonl: no such file", "datasets: gone/: no such file", "eval_datasets: gone/test.csv.gz: no such file",
        "model.load_from=gone: no such folder",
        "model.load_lora_from=empty: this folder holds no adapter_config.json",
        "model.from_checkpoint=empty: this folder holds no checkpoint.json",
        "model.chat_template=gone.jinja: can't be read: No such file or directory",
        "model.template_kwargs: tools is the run's to set", "model.template_kwargs: tokenize is the run's to set"]


def test_a_template_that_is_no_file_is_not_waited_for(files):
    os.mkfifo(files / "pipe")
    for name in ("pipe", "."):
        assert errors(f"model.chat_template={name}") == [f"model.chat_template={name}: not a file"]


def test_a_file_s_name_may_hold_stars_commas_and_quotes(files):
    for name in ("a*b.jsonl", "a,b.jsonl", "'q'.jsonl", "c", "d,e", "d", "e"):
        (files / name).write_text("")
    good = ["a*b.jsonl", "a*b.jsonl*2", "a,b.jsonl", "'q'.jsonl", "a.jsonl"]
    assert load("""datasets=[a*b.jsonl,a*b.jsonl*2, "a,b.jsonl" ,'q'.jsonl,'a.jsonl']""").datasets == good
    assert load("datasets=[./d,./e]").datasets == ["./d", "./e"]
    assert errors("datasets=[c,a,b.jsonl]") == [
        """datasets: the file a,b.jsonl has a comma: put it in quotes, 'datasets=["a,b.jsonl"]'"""]


@pytest.mark.parametrize("key, file", [
    ("load_from", "config.json"), ("load_lora_from", "adapter_config.json"), ("from_checkpoint", "checkpoint.json"),
    ("from_checkpoint", "checkpoints/step-1/checkpoint.json"), ("from_checkpoint", "FINAL/checkpoint/checkpoint.json"),
    ("from_checkpoint", "checkpoint/checkpoint.json")])
def test_a_folder_that_holds_what_it_must_is_taken(files, key, file):
    (files / "folder" / file).parent.mkdir(parents=True)
    (files / "folder" / file).touch()
    assert getattr(load(f"model.{key}=folder", "model.use_peft=true").model, key) == "folder"
    other = "load_from" if key != "load_from" else "load_lora_from"
    assert len(errors(f"model.{other}=folder", "model.use_peft=true")) == 1


@pytest.mark.parametrize("content, message", [
    (b"{{ messages[0].content }}\xff", "model.chat_template=mine.jinja: not UTF-8"),
    (b"{% for message in messages %}\n{{ message.content }}\n{% endif %}",
     "model.chat_template=mine.jinja:3: not a Jinja template: Encountered unknown tag 'endif'."),
    (b"{{ messages[0].content ", "model.chat_template=mine.jinja:1: not a Jinja template: unexpected end of template"),
])
def test_a_template_that_can_t_be_one_is_named_with_its_line(files, content, message):
    (files / "mine.jinja").write_bytes(content)
    (error,) = errors("model.chat_template=mine.jinja")
    assert error.startswith(message)


@pytest.mark.parametrize("text", [
    "{% for message in messages %}{% if message.role == 'system' %}{% continue %}{% endif %}{{ message.content }}{% endfor %}",
    "{% for message in messages %}{%- generation -%}{{ message.content }}{% endgeneration %}{% endfor %}", "é"])
def test_a_template_may_have_what_transformers_reads(files, text):
    (files / "mine.jinja").write_text(text, encoding="utf-8")
    assert load("model.chat_template=mine.jinja", 'model.template_kwargs={"loud": true}').model.template_kwargs == {"loud": True}


def test_everything_wrong_is_said_at_once(config_file):
    found = errors("sed=1", "lr=fast", "nonsense", "warmup=2", "model.batch_size=7", "exp_name=a/b", world_size=2)
    expected = ["'nonsense'", "unknown key 'sed'", "lr='fast'", "exp_name='a/b'", "warmup=2.0", "model.batch_size=7"]
    assert len(found) == len(expected) and all(any(text in line for line in found) for text in expected)
    assert len(errors_of("nonsense", "--config")) == 2
    assert len(errors_of("nonsense", "--config", "missing.py")) == 2
    path = config_file("config = Config(lr='fast', seed=1.5, n_examples=True, datasets='a.jsonl')")
    wrong = [line.removeprefix(f"{path}: ").partition("=")[0] for line in errors_of("--config", path, "sed=1", "seed=2")]
    assert wrong == ["datasets", "seed", "n_examples", "lr", "unknown key 'sed', did you mean 'seed'?"]


@pytest.mark.parametrize("text, expected", [
    ("x = Config()", "the file must set `config = Config"),
    ("config = {'lr': 1}", "the file must set `config = Config"),
    ("config = Config(", "SyntaxError"),
    ("config = Config(lrr=1)", "TypeError: .*'lrr'"),
    ("config = Config()\nconfig.lrr = 1", "AttributeError: .*'lrr'"),
    ("config = Config()\nconfig.model.max_lenght = 1", "AttributeError: .*'max_lenght'"),
    ("exit()", "SystemExit: "), ("raise GeneratorExit('x')", "GeneratorExit: x"),
    ("config = Config(seed=True)", "seed=True must be"), ("import sys\nsys.exit('no GPU')", "SystemExit: no GPU"),
    ("raise RuntimeError('first line\\nsecond line')", "RuntimeError: first line"),
    ("import nothing_of_this_name", "ModuleNotFoundError: .*nothing_of_this_name"),
    ("config = Config(model={'max_length': 8})", "model={.*} must be a ModelConfig"),
    ("config = Config(model=ModelConfig(peft=None))", "model.peft=None must be a PeftConfig"),
    ("config = Config(model=ModelConfig(batch_size='32'))", "model.batch_size='32' must be an integer"),
    ("config = Config(lr=float('inf'))", "lr=inf must be a number"),
    ("config = Config(datasets=[1])", "datasets=.1. must be a list"),
])
def test_a_config_file_that_is_wrong_is_named(config_file, text, expected):
    path = config_file(text)
    (error,) = errors_of("--config", path)
    assert path in error and re.search(expected, error)


@pytest.mark.parametrize("key, said", [
    ("train_datasets", "it is called datasets here"), ("test_datasets", "it is called eval_datasets here"),
    ("loss", "sft.py has one loss"), ("loss.beta", "sft.py has one loss"), ("model", "--config configs/NAME.py"),
    ("model.policy_dtype", "export_dtype"), ("model.reward_model.path", "no reward model"), ("warmup_steps", "warmup here"),
    ("wandb.entity", "WANDB_ENTITY"),
])
def test_a_key_of_halos_is_answered_with_what_it_is_called_here(key, said):
    (error,) = errors(f"++{key}=1")
    assert error.startswith(f"unknown key {key!r}: ") and said in error


def test_every_key_that_the_hints_name_exists():
    hints = json.loads((ROOT / "configs/halos.json").read_text())
    known = {key for key, _ in KNOBS}
    assert not known & hints.keys()  # what is known needs no hint
    named = {word for hint in hints.values() for word in re.findall(r"(?:^it is (?:called )?|see )([a-z_.]+)(?= here|$|,)", hint)}
    assert {"datasets", "eval_datasets", "model.microbatch_tokens", "model.packing"} <= named
    assert named <= known | {"torchrun"}


@pytest.mark.parametrize("overrides, expected", [([], 48), (["model.max_length=512"], 256), (["model.max_length=8"], 4),
                                                 (["model.max_prompt_length=7"], 7)])
def test_half_of_a_row_may_be_prompt_unless_said_otherwise(tmp_path, overrides, expected):
    path = tmp_path / "config.py"
    path.write_text("from configs.base import Config, ModelConfig\n"
                    "config = Config(exp_name='a', datasets=['x.jsonl'], model=ModelConfig(name_or_path='m', max_length=96))")
    assert load_config(["--config", str(path), *overrides], 1).model.max_prompt_length == expected


@pytest.mark.parametrize("argv, expected", [
    ([], "--config is required"), (["--config"], "--config is required"), (["lr=1"], "--config is required"),
    (["--config", "missing.py"], "--config missing.py: no such file"), (["--config", str(ROOT)], "no such file"),
    (["--config", TINY, "--lr"], "'--lr' is not of the form key=value"),
])
def test_a_command_line_without_a_config_file_or_a_value(argv, expected):
    assert expected in errors_of(*argv)[0]


# ---------------------------------------------------------------------------------------------------------------------
# The script's own answers, which must not wait for torch to be imported


def script(*argv: str) -> tuple[subprocess.CompletedProcess, set[str]]:
    """Runs sft.py; returns what came of it and the names of the modules it imported."""
    done = subprocess.run([sys.executable, "-X", "importtime", str(ROOT / "sft.py"), *argv], capture_output=True, text=True)
    imported = set(re.findall(r"^import time:.*\| +([\w.]+)$", done.stderr, re.MULTILINE))
    done.stderr = "".join(line for line in done.stderr.splitlines(True) if not line.startswith("import time:"))
    return done, imported


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_shows_every_knob_with_default_type_bounds_and_meaning(flag):
    done, imported = script(flag)
    assert done.returncode == 0 and not done.stderr
    assert "configs.base" in imported and not imported & {"torch", "transformers", "numpy"}
    shown = {key: rest for key, *rest in re.findall(r"^  ([\w.]+) = (.*)  \((.*)\)\n      (\S.*)$", done.stdout, re.MULTILINE)}
    assert len(done.stdout.splitlines()) == 2 + 2 * len(shown) and done.stdout.splitlines()[2:] == usage().splitlines()[2:]
    assert list(shown) == [key for key, _ in KNOBS]
    for key, (item, _) in KNOBS:
        text, _ = item.metadata["bounds"]
        default, kind, meaning = shown[key]
        assert meaning == item.metadata["meaning"].removeprefix("required: ") and kind.endswith(f", {text}" if text else kind)
        assert (default == "required") == item.metadata["meaning"].startswith("required: ")
    assert shown["model.max_length"][:2] == ["2048", "an integer, from 2 to 1,000,000,000,000"]
    assert shown["n_examples"][:2] == ["null", "an integer or null, from 1 to 1,000,000,000,000"]
    assert shown["warmup"][:2] == ["0.1", "a number, at least 0 and below 1"]
    assert shown["exp_name"][:2] == ["required", "a text"] and shown["do_first_eval"][:2] == ["true", "true or false"]
    assert shown["eval_datasets"][:2] == ["[]", "a list, [a,b]"]


@pytest.mark.parametrize("name", ["sft.py", "generate.py", "plot.py"])
@pytest.mark.parametrize("buffered", ["", "1"], ids=["buffered", "unbuffered"])
def test_help_into_a_pipe_that_is_closed_ends_without_a_word(name, buffered):
    """As `--help | head -1` may leave it."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, name, "--help"], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True,
                          env=os.environ | {"PYTHONUNBUFFERED": buffered})
    os.close(writer)
    assert done.stderr == ""
    shown = subprocess.run(f"{sys.executable} {name} --help | head -1", shell=True, cwd=ROOT, capture_output=True, text=True,
                           env=os.environ | {"PYTHONUNBUFFERED": buffered})
    assert shown.stderr == "" and shown.stdout.count("\n") == 1 and name in shown.stdout


def test_errors_are_told_without_a_traceback():
    done, imported = script("--config", TINY, "sed=1", "lr=fast")
    assert done.returncode == 1 and not done.stdout
    assert done.stderr == "sft.py: unknown key 'sed', did you mean 'seed'?\nlr='fast' must be a number\n"
    assert "torch" not in imported


@pytest.mark.parametrize("argv, said", [
    (["5"], "unrecognized arguments: 5"), (["--n", "-1"], "unrecognized arguments: --n -1"),
    ([], ".cache/tiny-data: can't be written: [Errno 20] Not a directory: '.cache/tiny-data'")])
def test_make_tiny_says_in_a_line_what_is_wrong(tmp_path, monkeypatch, capfd, argv, said):
    (tmp_path / ".cache").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["make_tiny.py", *argv])
    with pytest.raises(SystemExit) as error:
        make_tiny.main()
    assert error.value.code == 1 and capfd.readouterr() == ("", f"make_tiny.py: {said}\n")


# ---------------------------------------------------------------------------------------------------------------------
# A script's own kind of configuration


def write_config(folder: Path, kind: str) -> list[str]:
    (folder / "kind.py").write_text(f"from configs.base import {kind}, ModelConfig\n"
                                    f"config = {kind}(exp_name='x', datasets=['hh'], model=ModelConfig(name_or_path='m'))\n")
    return ["--config", str(folder / "kind.py")]


def test_dpo_has_the_common_keys_and_its_own(tmp_path):
    own = {key: item for key, (item, _) in knobs(DPOConfig) if key not in dict(KNOBS)}
    for key, value in (("conditional", "true"), ("last_answer_only", "false")):
        with pytest.raises(ConfigError, match=f"^{key}={value.title()} must be "):
            load_config([*write_config(tmp_path, "DPOConfig"), f"{key}={value}"], 1, None, DPOConfig)
    assert own.keys() == {"beta", "label_smoothing", "loss"} and {*dict(KNOBS)} < {key for key, _ in knobs(DPOConfig)}
    assert {default_of(item) for item in own.values()} == {0.1, 0.0, "sigmoid"}
    config = load_config([*write_config(tmp_path, "DPOConfig"), "beta=0.3", "loss=ipo", "lr=1e-6"], 1, None, DPOConfig)
    assert (config.beta, config.loss, config.lr, config.model.batch_size) == (0.3, "ipo", 1e-6, 32)
    assert all(f"\n  {key} = " in usage(DPOConfig) and f"\n  {key} = " not in usage() for key in own)
    for key, value, told in (("beta", 0, "above 0"), ("label_smoothing", 0.5, "at least 0 and below 0.5"),
                             ("loss", "dpo", "sigmoid or ipo")):
        with pytest.raises(ConfigError, match=f"^{key}={float(value) if key != 'loss' else value} must be {told}"):
            load_config([*write_config(tmp_path, "DPOConfig"), f"{key}={value}"], 1, None, DPOConfig)
    then, now = (dataclasses.asdict(DPOConfig(**changed)) for changed in ({}, {"beta": 0.2, "loss": "ipo", "lr": 1}))
    assert changes(then, now, kind=DPOConfig) == ["lr: 5e-06 then, 1 now", "beta: 0.1 then, 0.2 now",
                                                  "loss: 'sigmoid' then, 'ipo' now"]


@pytest.mark.parametrize("kind, wanted", [("Config", DPOConfig), ("DPOConfig", Config)])
def test_a_configuration_of_another_script_is_refused(tmp_path, kind, wanted):
    """Also of a kind that has all keys of the one that is wanted."""
    argv = write_config(tmp_path, kind)
    with pytest.raises(ConfigError, match=rf"kind.py: the file must set `config = {wanted.__name__}\(...\)`"):
        load_config(argv, 1, None, wanted)
    assert type(load_config(argv, 1, None, Config, DPOConfig)).__name__ == kind
