"""Hostile settings and settings files give a value of the right type or a one-line error."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from tests.fuzz import examples
from xmc_trainer.commands.sweep import plan
from xmc_trainer.config import Config, load_config, shipped_configs, to_yaml
from xmc_trainer.config.fields import escaped, settings_of
from xmc_trainer.engine.accelerator import _let_deepspeed_check, deepspeed_settings
from xmc_trainer.errors import UserError

ROOT = Path(__file__).parents[2]
BASE = ["dataset=eurlex4k", "dataset_path=d"]
SETTINGS = settings_of(Config)
NUMBERS = [each for each in SETTINGS.values() if each.type in (int, float, list)]
# Words that YAML or OmegaConf would not read as text.
WORDS = (
    "2026_1_11", "2026_11_1", "007", "on", "no", "null", "Null", "~", "1e3", "0x10", "12:30:00", "2026-11-01", "{a: b}", "[x]", "a: b",
    "#x", "x #y", "'x'", '"x"', " x ", "x ", "!!int 7", "*a", "&a b", "- x", "<<", "=", "|", "true", ".inf", "5_", "${", "${data.dataset}",
    "\\${x}", "\\\\${x", "a\nb", "\u2028", "\x85", "\ufeffx", "\U0010ffff", "é", "x" * 150,
)  # fmt: skip


def fuzz(cases: int) -> settings:
    """Run the same `cases` every time, or as many random ones as XMC_FUZZ_EXAMPLES says."""
    more = examples(cases)
    return settings(
        max_examples=more,
        derandomize=more == cases,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def error_of(call, *arguments) -> str | None:
    """Return the message of the call's UserError, or None if it succeeds. Any other exception is a bug."""
    try:
        call(*arguments)
    except UserError as error:
        assert str(error) and str(error).isprintable() and len(str(error)) < 5000
        return str(error)
    return None


def value(config, name):
    for part in name.split("."):
        config = getattr(config, part)
    return config


# Text settings that accept one of a few words, and those that accept any.
TEXTS = [each for each in SETTINGS.values() if each.type is str and each.name != "dataset"]
CHOICES = [each for each in TEXTS if error_of(load_config, [*BASE, f"{each.name}=any_word"])]
FREE = [each for each in TEXTS if each not in CHOICES]


def test_the_text_settings_are_found():
    assert {"training.verbose.log_fname", "data.folder", "model.encoder.encoder_model", "environment.running_env"} <= {
        each.name for each in FREE
    }
    assert "training.amp.dtype" in {each.name for each in CHOICES} and len(FREE) > 15


def check_text(setting, word, yaml_file, text):
    """Check that a setting is `text`, given so on the command line, or as `word` in the file `yaml_file`."""
    yaml_file.write_text(word if isinstance(word, str) else yaml.safe_dump(word), encoding="utf-8")
    for words in ([*BASE, f"{setting.name}={escaped(text)}"], [f"dataset={yaml_file}", "dataset_path=d"]):
        if setting.name == "dataset_path":
            words = [each for each in words if each != "dataset_path=d"]
        try:
            found = value(load_config(words), setting.name)
        except UserError:
            # The text is not a valid name, path or variable.
            is_name = setting.name.rsplit(".", 1)[-1] in ("log_fname", "checkpoint_file") and (
                text[:1] == "." or "/" in text or len(text.encode()) > 200
            )
            assert not text or "\0" in text or text.startswith("~") or is_name or setting in CHOICES
        else:
            says_null = setting.optional and text == "null" and words[0] == BASE[0]
            shipped = "Eurlex-4K" if setting.name == "data.folder" else None
            assert found == (shipped if says_null else text)


@fuzz(300)
@given(st.sampled_from(TEXTS), st.text(st.characters(exclude_categories=["Cs"]), max_size=30) | st.sampled_from(WORDS))
def test_text_stays_text(tmp_path_factory, setting, text):
    tree = escaped(text)
    for part in reversed(setting.name.split(".")):
        tree = {part: tree}
    check_text(setting, tree, tmp_path_factory.getbasetemp() / "text.yaml", text)


@pytest.mark.parametrize(
    "text",
    [
        "2026_1_11",
        "007",
        "on",
        "no",
        "1e3",
        "0x10",
        "12:30:00",
        "2026-11-01",
        "~x",
        "x #y",
        "1_000",
        ".inf",
        "yes",
        "=",
    ],
)
def test_plain_words_in_a_file_are_verbatim(text, tmp_path):
    for setting in FREE:
        if text == "~x" and setting.name in ("dataset_path", "output_dir", "data.cache_dir"):
            continue  # a user's home folder
        head = "".join(f"{'  ' * depth}{part}:\n" for depth, part in enumerate(setting.name.split(".")))[:-1]
        check_text(setting, f"{head} {text}\n", tmp_path / "plain.yaml", text.split(" #")[0])


def test_two_names_are_two_runs():
    folders = {
        load_config([*BASE, f"log_fname={name}"]).run_folder.name
        for name in ("2026_1_11", "2026_11_1", "2026111", "007", "7")
    }
    assert folders == {"2026_1_11", "2026_11_1", "2026111", "007", "7"}


def test_null_clears_optional_settings(tmp_path):
    file = tmp_path / "mine.yaml"
    for said, folder in (("null", None), ("~", None), ("", None), ("'null'", "null"), ('"~"', "~")):
        file.write_text(f"data:\n  folder: {said}\n")
        assert load_config([f"dataset={file}"]).data.folder == folder
    file.write_text("training:\n  optimization: {max_steps: ~}\n  verbose: {wandb_runname: null}\n")
    training = load_config([f"dataset={file}"]).training
    assert training.optimization.max_steps is None and training.verbose.wandb_runname == "null"
    assert load_config([*BASE, "data.folder=null"]).data.folder == "Eurlex-4K"  # the shipped one
    assert load_config([*BASE, "training.verbose.wandb_runname=null"]).training.verbose.wandb_runname == "null"


def test_references():
    words = [
        "training.verbose.log_fname=${data.dataset}-${model.ffi.fan_in}",
        "data.test_batch_size=${dataset.data.batch_size}",
        "data.batch_size=7",
    ]
    config = load_config([*BASE, *words])
    assert config.run_folder.name == "eurlex4k-64" and config.data.test_batch_size == 7
    for word, said in [
        ("output_dir=${output_dir}", "refers to itself"),
        ("data.folder=${data.folder}${data.dataset}", "refers to itself"),
        ("data.folder=${data.datset}", "write data.dataset"),
        ("data.folder=${", "is not a valid reference"),
        ("data.folder=${oc.env:XMC_NOT_SET}", "XMC_NOT_SET is not set"),
        ("data.folder=x${log_fname}", "refers to log_fname, which is null"),
    ]:
        assert said in error_of(load_config, [*BASE, word])


def test_references_to_the_environment(monkeypatch):
    monkeypatch.setenv("XMC_TEST", "on")
    assert load_config([*BASE, "data.folder=a/${oc.env:XMC_TEST}/${oc.env:XMC_NOT_SET,b}"]).data.folder == "a/on/b"


@pytest.mark.parametrize("setting", NUMBERS, ids=lambda each: each.name)
def test_every_number_has_a_domain(setting):
    domain, whole = setting.domain, setting.type is not float
    assert domain is not None and math.isfinite(domain.low) and math.isfinite(domain.high)
    step = 1 if whole else None
    below = domain.low - 1 if step else math.nextafter(domain.low, -math.inf)
    above = domain.high + 1 if step else math.nextafter(domain.high, math.inf)
    inside, outside = (
        [],
        [
            below,
            above,
            "nan",
            "inf",
            "-inf",
            ".inf",
            ".nan",
            -1e300,
            1e300,
            10**39,
            -(10**39),
            "9" * 5000,
            "-" + "9" * 5000,
        ],
    )
    (inside if domain.text[0] == "[" else outside).append(domain.low)
    (inside if domain.text[-1] == "]" else outside).append(domain.high)

    def said(number):
        number = int(number) if whole and isinstance(number, float) and abs(number) < 1e18 else number
        text = number if isinstance(number, str) else repr(number)
        return error_of(load_config, [*BASE, f"{setting.name}={f'[{text}]' if setting.type is list else text}"]) or ""

    for number in inside:
        assert "must be in" not in said(number) and "must be a" not in said(number)
    for number in outside:
        refused = said(number)
        assert refused.startswith(setting.name) and ("must be in" in refused or "must be a whole number" in refused), (
            number,
            refused,
        )


VALUES = st.one_of(
    st.text(max_size=20),
    st.binary(max_size=8).map(lambda raw: raw.decode("utf-8", "surrogateescape")),
    st.sampled_from(WORDS),
    st.sampled_from(["", "=", "[", "{", "[" * 10_000, "9" * 5000, "1e999", "-0", "nan", "inf", "-1", "0", "1e400", "[1,2", "[[1]]", "{a: 1}",
                     "{a: b}", "&a [*a]", "!!python/object:os.system x", "? a", "%", "\0", "${" * 500, "${data.dataset}" * 2000, "٣", "1__0", "+5"]),
    st.floats().map(repr),
    st.integers().map(str),
)  # fmt: skip
NAMES = st.one_of(
    st.sampled_from(list(SETTINGS)),
    st.sampled_from(
        [name.rpartition(".")[0] for name in SETTINGS if "." in name]
        + ["environment.env2path.x.y", "environment.env2path."]
    ),
    st.sampled_from(list(SETTINGS)).flatmap(
        lambda name: st.sampled_from(
            [name[1:], name.upper(), name + ".x", "." + name, "+" + name, "~" + name, name + "[0]"]
        )
    ),
    st.text(max_size=15),
)


@fuzz(1500)
@given(st.lists(st.tuples(NAMES, VALUES).map("=".join) | st.text(max_size=10), max_size=3))
@example(["data.num_labels=" + "9" * 5000])
@example(["training.optimization.lr="])
@example(["environment.env2path="])
@example(["data.batch_size"])
@example(["dataset=" + "x" * 5000 + ".yaml"])
@example(["output_dir=~nobody_of_that_name/x"])
def test_hostile_settings_give_a_one_line_error(words):
    error_of(load_config, [*BASE, *words])


SHIPPED = [item.read_bytes() for item in shipped_configs().values()] + [
    (ROOT / "tests/assets/spartex_lfamazontitles131k.yaml").read_bytes()
]
FRAGMENTS = [
    b"\xff", b"\0", b"\t", b"\x1b[31m", b"\xef\xbb\xbf", b"&a ", b"*a", b"*none ", b"!!python/object/apply:os.system [x]", b"!!binary ", b"!local ", b"{", b"}", b"[", b"]",
    b"- ", b": ", b"? ", b"%YAML 3.0\n", b"---\n", b"...\n", b"<<: *a\n", b"'", b'"', b"|\n", b">\n", b"#", b"${", b"${model.ffi.fan_in}", b"~", b"null", b"nan", b".inf",
    b"data:\n", b"  batch_size: 0\n", b"model: {ffi: 3}\n", b"  ffi: [1]\n", b"[" * 3000, b"{a: " * 3000, b"- " * 3000, b"9" * 5000, "\u2028".encode(), b'"\\ud800"', b'"\\UFFFFFFFF"',
    b"training: {seed: !!int x}\n", b"a: &a [*a]\n", b"dataset: {x: y}\n",
]  # fmt: skip


@st.composite
def corrupted(draw, originals):
    """A file in which a few bytes are replaced, removed or doubled, or hostile fragments inserted."""
    content = bytearray(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(content)))
        length = draw(st.integers(0, 40))
        new = draw(st.sampled_from(FRAGMENTS) | st.binary(max_size=4) | st.just(bytes(content[at : at + length])))
        content[at : at + draw(st.sampled_from([0, 0, 1, length]))] = new
    return bytes(content)


@fuzz(350)
@given(
    corrupted(SHIPPED) | st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "replace"))
)
def test_hostile_yaml_files_give_a_one_line_error(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "hostile.yaml"
    file.write_bytes(content)
    error_of(load_config, [f"dataset={file}", "dataset_path=d"])


@pytest.mark.parametrize("content, said", [
    (b"data: {max_len: 3}\ndata: {max_len: 4}\n", "line 2: data occurs twice, first in line 1"),
    (b"data:\n  max_len: \xff\n", "line 2: not UTF-8"),
    (b"data:\n  folder: \0\n", "line 2: not valid YAML: contains the character U+0000"),
    (b"data:\n  folder: !!python/object/apply:os.system [x]\n", "line 2: data.folder: needs a single value, not a list"),
    (b"data:\n  folder: !!python/name:os.system x\n", "line 2: the tag !!python/name:os.system is not supported"),
    (b"data: &a {folder: *a}\n", "data.folder: needs a single value, not a mapping"),
    (b"data: &a [*a]\n", "data: is a section"),
    (b"model:\n  ffi: 7\n", "line 2: model.ffi: is a section"),
    (b"model:\n  ffi:\n    fanin: 7\n", "line 3: model.ffi.fanin: there is no such setting; write model.ffi.fan_in"),
    (b"data:\n  batch_size: [1]\n", "line 2: data.batch_size: needs a single value, not a list"),
    (b"data:\n  batch_size: 0\n", "line 2: data.batch_size=0: must be in [1, 1048576]"),
    (b"data:\n  batch_size:\n", "line 2: data.batch_size: cannot be null"),
    (b"training:\n  optimization:\n    lr: quick\n", "line 3: training.optimization.lr=quick: must be a number"),
    (b"data: " + b"[" * 10_000, "nested too deeply"),
    (b"data: " + b"{a: " * 10_000, "nested too deeply"),
    (b'data:\n  folder: "\\UFFFFFFFF"\n', "not valid YAML"),
    (b"#" * (1 << 19), "larger than 256 KiB"),
    (b"data:\n  folder: ${data.source}\n  source: ${data.folder}\n", "refers to itself"),
    (b"environment: {env2path: [a]}\n", "env2path: must be a mapping"),
    (b"environment: {env2path: {a: [b]}}\n", "a list where a single value is needed"),
    (b"training: {optimization: {lr_milestones: 3}}\n", "lr_milestones=3: must be a list"),
    (b"a\n---\nb\n", "expected a single document"),
])  # fmt: skip
def test_errors_in_a_file_name_the_line(content, said, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_bytes(content)
    refused = error_of(load_config, [f"dataset={file}"])
    assert str(file) in refused and said in refused


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "folder.yaml").mkdir()
    for name, said in (
        ("folder.yaml", "is not a file"),
        ("nowhere.yaml", "No such file"),
        ("a" * 300 + ".yaml", "File name too long"),
        ("a\0.yaml", "is not a valid file name"),
    ):
        assert said in error_of(load_config, [f"dataset={tmp_path / name}"])


def test_aliases_cannot_multiply(tmp_path):
    levels = "\n".join(f"  k{n}: &l{n + 1} [{', '.join([f'*l{n}'] * 9)}]" for n in range(1, 18))
    (tmp_path / "bomb.yaml").write_text(f"data:\n  k0: &l1 x\n{levels}\n")
    assert "there is no such setting" in error_of(load_config, [f"dataset={tmp_path / 'bomb.yaml'}"])
    texts = [
        "data.folder",
        "data.source",
        "data.text_column",
        "data.label_column",
        "data.train_split",
        "data.test_split",
        "data.cache_dir",
    ]
    words = [f"{name}={f'${{{other}}}' * 100}" for name, other in zip(texts, texts[1:])] + [f"{texts[-1]}={'x' * 100}"]
    assert "characters" in error_of(load_config, [*BASE, *words])


@st.composite
def configurations(draw):
    """`key=value` words for a few settings, each valid for its type and domain."""
    words = []
    for setting in draw(
        st.lists(st.sampled_from(list(SETTINGS.values())), min_size=1, max_size=8, unique_by=lambda each: each.name)
    ):
        if setting.type is bool:
            word = draw(st.sampled_from(["true", "false"]))
        elif setting.type in (int, float, list):
            low, high = setting.domain.low, setting.domain.high
            word = draw(
                st.floats(low, high).map(repr) if setting.type is float else st.integers(int(low), int(high)).map(str)
            )
            word = f"[{word}]" if setting.type is list else word
        elif setting.type is str and setting.name != "dataset":
            word = escaped(
                draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=200) | st.sampled_from(WORDS))
            )
        elif setting.type is dict:
            words.append(
                f"{setting.name}.{draw(st.text(st.characters(exclude_categories=['Cs'], exclude_characters='=')))}={escaped(draw(st.sampled_from(WORDS)))}"
            )
            continue
        else:
            continue
        words.append(f"{setting.name}={word}")
    return words


@fuzz(150)
@given(configurations())
@example(
    [
        "training.verbose.wandb_runname=" + "long words " * 30,
        "data.folder=\\${data.dataset}",
        "environment.env2path.a: b #c=~",
    ]
)
@example(["training.verbose.wandb_runname= two\n\n lines ", "data.folder=null", "log_fname=\u2028\x85\ufeff"])
def test_print_config_output_loads_as_an_equal_configuration(tmp_path_factory, words):
    try:
        config = load_config([*BASE, *words])
    except UserError:
        assume(False)
    file = tmp_path_factory.getbasetemp() / "printed.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")
    again = load_config([f"dataset={file}"])
    assert dataclasses.asdict(again) | {"dataset": "eurlex4k"} == dataclasses.asdict(config)


SWEEPS = [file.read_bytes() for file in sorted((ROOT / "launchers/sweeps").glob("*.yaml"))]


@fuzz(60)
@given(
    corrupted(
        [
            b"settings: [dataset=sidgnd]\nseeds: [1, 2]\nrows:\n  a: [model.ffi.fan_in=8]\n  'b c': []\nsplits: [dev]\nstrengths: [0, 0.3]\n",
            *SWEEPS[:1],
        ]
    )
)
@example(b"rows: {a: []}\nseeds: [" + b"9" * 5000 + b"]\nsettings: [dataset=sidgnd]")
@example(b"rows: {a: [x, [y]]}")
@example(b"rows: {a: [dataset=sidgnd]}\nrows: {b: []}")
@example(b"rows: &a {a: *a}")
@example(b"rows: {? [a] : []}")
@example(b"rows: {a: []}\nstrengths: [.nan]\nsettings: [dataset=sidgnd]")
@example(b"rows: " + b"[" * 10_000)
def test_hostile_sweeps_give_a_one_line_error(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "sweep.yaml"
    file.write_bytes(content)
    error_of(plan, file, ["dataset_path=d"])


def read_deepspeed_file(path):
    _let_deepspeed_check(path, deepspeed_settings(path, "no", 1, 4, 1, 0.0))


JSON_FRAGMENTS = st.sampled_from(
    [
        b"{",
        b"}",
        b"[",
        b"]",
        b"null",
        b"NaN",
        b"-1",
        b"true",
        b'"auto"',
        b'"x": 1,',
        b"1e999",
        b"\xff",
        b"\0",
        b'"\\ud800"',
        b"[" * 5000,
    ]
)


@st.composite
def corrupted_json(draw):
    """A shipped file with a value replaced, or with corrupted bytes."""
    content = draw(st.sampled_from([file.read_bytes() for file in sorted((ROOT / "ds_configs").glob("*.json"))]))
    if draw(st.booleans()):
        at, length = draw(st.integers(0, len(content))), draw(st.integers(0, 20))
        return content[:at] + draw(JSON_FRAGMENTS) + content[at + length :]
    tree = json.loads(content)
    part = draw(st.sampled_from([tree, *(value for value in tree.values() if isinstance(value, dict))]))
    names = st.sampled_from(
        [
            *part,
            "offload_param",
            "steps_per_print",
            "bf16",
            "fp16",
            "loss_scale",
            "zero_optimization",
            "train_batch_size",
            "tensorboard",
        ]
    )
    scalars = (
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(max_size=5)
    )
    part[draw(names)] = draw(
        scalars | st.lists(scalars, max_size=2) | st.dictionaries(st.text(max_size=5), scalars, max_size=2)
    )
    return json.dumps(tree).encode()


@fuzz(300)
@given(corrupted_json())
def test_hostile_deepspeed_files_give_a_one_line_error(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "ds.json"
    file.write_bytes(content)
    error_of(read_deepspeed_file, str(file))
