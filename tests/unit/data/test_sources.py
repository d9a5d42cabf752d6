"""BAGEL's file formats: what rows become, and that nothing is lost in silence."""

import io
import itertools
import json
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hyperbagel.core.errors import InputError
from hyperbagel.data.loader import BrokenRow, Loader, Phase
from hyperbagel.data.mixture import SourceConfig, build_source
from hyperbagel.data.plan import Sample, Text, VaeImage, VitImage
from hyperbagel.data.sources import ChatSource, EditSource, FileSource, Reading, T2ISource
from hyperbagel.data.tokenizer import Tokenizer
from hyperbagel.data.toybox_source import ToyboxSource
from hyperbagel.data.transforms import ImageTransform

ASSETS = Path(__file__).parents[3] / "hyperbagel" / "assets" / "toybox"
TOKENIZER = Tokenizer.from_folder(ASSETS)
READING = Reading(TOKENIZER, ImageTransform(64, 32, 16), ImageTransform(64, 32, 8), seed=3)


def png(shade: int, size: tuple[int, int] = (48, 32)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (shade,) * 3).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, rows: list[dict[str, Any]], row_group_size: int = 2) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=row_group_size)
    return path


def shape(sample: Sample) -> list[str]:
    """A plan in short: text words, e = VAE clean, n = noise, v = ViT, with the first pixel's shade."""
    out = []
    for item in sample:
        if isinstance(item, Text):
            out.append(TOKENIZER.decode(list(item.ids)) + ("*" if item.loss else "") + ("?" if item.enable_cfg else ""))
        else:
            kind = "v" if isinstance(item, VitImage) else "n" if item.loss else "e"
            out.append(f"{kind}{item.pixels[0, 0, 0]}" + ("?" if item.enable_cfg else ""))
    return out


def test_t2i(tmp_path: Path) -> None:
    rows = [{"image": png(i), "captions": json.dumps({"short": f"number {i}", "empty": ""})} for i in range(5)]
    source = T2ISource(write(tmp_path / "a.parquet", rows), READING)
    assert len(source) == 5
    found = [shape(source.sample(i)) for i in range(10)]
    assert sorted(found[:5]) == sorted(found[5:]) == [[f"number {i}?", f"n{i}"] for i in range(5)]
    assert found[:5] != found[5:]  # each pass has its own order
    assert [shape(source.sample(i)) for i in range(10)] == found
    image = source.sample(0)[1]
    assert isinstance(image, VaeImage) and image.pixels.shape == (32, 48, 3) and image.pixels.dtype == np.uint8
    copy = pickle.loads(pickle.dumps(source))
    assert shape(copy.sample(7)) == found[7]


@pytest.mark.parametrize("captions", [json.dumps(["one", "two"]), ["one", "two"], {"short": "one", "long": "two"}])
def test_caption_lists_and_the_datasets_form(captions: object, tmp_path: Path) -> None:
    rows = [{"image": {"bytes": png(7), "path": "x.png"}, "captions": captions}]
    source = T2ISource(write(tmp_path / "a.parquet", rows), READING)
    assert {shape(source.sample(i))[0] for i in range(20)} == {"one?", "two?"}


SYSTEM = "You should first think about the planning process"


def thinking(sample: Sample) -> list[str]:
    """As `shape`, the system prompt as S, plans as P and what they say."""
    texts = [re.sub(f"^{SYSTEM}.*", "S", text, flags=re.DOTALL) for text in shape(sample)]
    plans = [item for item in sample if isinstance(item, Text) and item.loss]
    assert all(item.tied and not item.enable_cfg for item in plans)
    return [re.sub(r"^<think>(.*)</think>\*$", r"P \1", text) for text in texts]


@pytest.mark.parametrize("form", [json.dumps, dict])
def test_captions_with_plans(tmp_path: Path, form: Any) -> None:
    captions, plans = {"a": "one", "b": "two", "c": "three"}, {"b": "<think>second</think>", "a": "first", "c": " "}
    path = write(tmp_path / "a.parquet", [{"image": png(5), "captions": form(captions), "plans": form(plans)}])
    always, plain = T2ISource(path, READING, think_share=1.0), T2ISource(path, READING)
    with_plan = {("S", "one?", "P first", "n5"), ("S", "two?", "P second", "n5")}
    without = {(f"{text}?", "n5") for text in captions.values()}
    assert {tuple(thinking(always.sample(i))) for i in range(30)} == with_plan
    assert {tuple(thinking(plain.sample(i))) for i in range(30)} == without
    some = [tuple(thinking(T2ISource(path, READING, think_share=0.3).sample(i))) for i in range(200)]
    assert set(some) == with_plan | without and 30 < sum(sample in with_plan for sample in some) < 90


def test_edits_with_plans(tmp_path: Path) -> None:
    row = {"image_list": [png(0), png(1), png(2)], "instruction_list": [["a"], ["b", "c"], ["d"]], "plan_list": [None, "so", "too many"]}
    path = write(tmp_path / "a.parquet", [row])
    found = {" ".join(thinking(EditSource(path, READING, think_share=1.0).sample(i))) for i in range(20)}
    assert found == {f"S e1? v1? {text}? P so n2" for text in "bc"}
    plain = {" ".join(thinking(EditSource(path, READING).sample(i))) for i in range(60)}
    assert len(plain) == 7 and not any("P" in sample for sample in plain)


@pytest.mark.parametrize("task", ["t2i", "edit"])
def test_plans_of_files_are_read_as_the_toybox_has_them(task: Any, tmp_path: Path) -> None:
    wanted = ToyboxSource(task, TOKENIZER, 2, think_share=1.0).sample(1)
    pictures = [item.pixels for item in wanted if isinstance(item, VaeImage)]
    prompt, plan = (TOKENIZER.decode(list(item.ids)) for item in wanted if isinstance(item, Text) and (item.enable_cfg or item.loss))
    encoded = []
    for pixels in pictures:
        Image.fromarray(pixels).save(buffer := io.BytesIO(), "PNG")
        encoded.append(buffer.getvalue())
    rows = {"t2i": {"image": encoded[0], "captions": [prompt], "plans": [plan]}}
    rows["edit"] = {"image_list": encoded, "instruction_list": [[prompt]], "plan_list": [plan]}
    path = write(tmp_path / "a.parquet", [rows[task]])
    found = build_source("x", SourceConfig(kind=task, path=path, think_share=1.0), TOKENIZER, READING.vae, READING.vae, 0).sample(0)
    assert [type(item) for item in found] == [type(item) for item in wanted]
    for mine, theirs in zip(found, wanted, strict=True):
        mine, theirs = vars(mine), vars(theirs)
        assert all(np.array_equal(mine.pop(name, ()), theirs.pop(name, ())) for name in ("pixels", "ids")) and mine == theirs


@pytest.mark.parametrize(
    ("plans", "told"),
    [
        (None, "plans are a NoneType, expected a JSON object or list of texts"),
        ("[]", "no plan by the name or place of a caption"),
        ('{"0": "by another name"}', "no plan by the name or place of a caption"),
        ("no", "plans are no JSON"),
    ],
)
def test_a_caption_without_a_plan_is_a_broken_row(tmp_path: Path, plans: object, told: str) -> None:
    path = write(tmp_path / "a.parquet", [{"image": png(1), "captions": '["a"]', "plans": plans}])
    with pytest.raises(BrokenRow, match=told):
        T2ISource(path, READING, think_share=1.0).sample(0)
    assert shape(T2ISource(path, READING).sample(0)) == ["a?", "n1"]


def test_plans_that_are_not_there(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [{"image_list": [png(0), png(1)], "instruction_list": [["a"]], "plan_list": [None]}])
    with pytest.raises(BrokenRow, match="no plan"):
        EditSource(tmp_path, READING, think_share=1.0).sample(0)
    write(tmp_path / "a.parquet", [{"image": png(1), "captions": '["a"]'}])
    with pytest.raises(InputError, match="got columns image, captions, expected image, captions, plans"):
        T2ISource(tmp_path, READING, think_share=0.1)
    with pytest.raises(ValueError, match="think_share is of sources that draw"):
        SourceConfig(kind="chat", path=tmp_path, think_share=0.5)


def test_edit_chains(tmp_path: Path) -> None:
    rows = [{"image_list": [png(0), png(1), png(2)], "instruction_list": [["add a cat."], ["make it red", "paint it red"]]}]
    source = EditSource(write(tmp_path / "a.parquet", rows), READING)
    found = {" ".join(shape(source.sample(i))) for i in range(60)}
    red = ("make it red", "paint it red")
    single = {"e0? v0? add a cat.? n1", *(f"e1? v1? {r}? n2" for r in red)}
    merged = {f"e0? v0? add a cat; {r}? n2" for r in red}
    turns = {f"e0? v0? add a cat.? n1 e1? v1? {r}? n2" for r in red}
    assert found == single | merged | turns


def test_chat(tmp_path: Path) -> None:
    (tmp_path / "pics").mkdir()
    for i in range(2):
        (tmp_path / "pics" / f"{i}.png").write_bytes(png(i))
    turns = [{"from": "human", "value": "<image>left, <image>right: same?"}, {"from": "gpt", "value": "no"}]
    more = [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "the shade"}]
    lines = [
        {"image": ["0.png", "1.png"], "conversations": turns + more},
        {"image": "1.png", "conversations": [{"from": "user", "value": "what?"}, {"from": "assistant", "value": "a one"}]},
        {"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}]},
    ]
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n", encoding="utf-8")
    source = ChatSource(path, tmp_path / "pics", READING)
    assert len(source) == 3
    assert sorted(shape(source.sample(i)) for i in range(3)) == sorted(
        [["v0", "left,", "v1", "right: same?", "no*", "why?", "the shade*"], ["v1", "what?", "a one*"], ["hello", "hi*"]]
    )


@pytest.mark.parametrize(
    "row",
    [
        {"image": b"no picture", "captions": '["a"]'},
        {"image": png(1)[:40], "captions": '["a"]'},
        {"image": None, "captions": '["a"]'},
        {"image": png(1), "captions": "not json"},
        {"image": png(1), "captions": "[]"},
        {"image": png(1), "captions": "3"},
        {"image": png(1), "captions": '"a red cat"'},
        {"image": png(1), "captions": "[" * 100_000},
        {"image": png(1), "captions": None},
    ],
)
def test_a_broken_row_says_where(tmp_path: Path, row: dict[str, Any]) -> None:
    path = write(tmp_path / "a.parquet", [row, {"image": png(1), "captions": '["whole"]'}])
    source = T2ISource(path, READING)
    outcomes = []
    for i in range(2):
        try:
            outcomes.append(shape(source.sample(i)))
        except BrokenRow as error:
            assert f"{path} row group 0 row 0: " in str(error)
    assert outcomes == [["whole?", "n1"]]
    loader = Loader({"a": source}, [Phase(None, {"a": 1})], {"a": 4}, seed=0)
    assert [shape(s) for s in loader.next_group().samples] == [["whole?", "n1"]] * 4 and loader.broken["a"] == 2


def test_an_instruction_that_is_no_list_is_a_broken_row(tmp_path: Path) -> None:
    """It has letters, which are no instructions."""
    write(tmp_path / "a.parquet", [{"image_list": [png(1), png(2)], "instruction_list": "make it red"}])
    with pytest.raises(BrokenRow, match="instruction_list is a str, expected a list"):
        EditSource(tmp_path, READING).sample(0)


@pytest.mark.parametrize(
    "line",
    [
        "{not json",
        '{"image": "none.png", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}',
        '{"image": [], "conversations": [{"from": "human", "value": "<image> a"}, {"from": "gpt", "value": "b"}]}',
        '{"conversations": [{"from": "human", "value": "only a question"}]}',
        '{"conversations": [{"from": "robot", "value": "a"}]}',
        '{"text": "other format"}',
        "[1, 2]",
    ],
)
def test_broken_chat_lines(tmp_path: Path, line: str) -> None:
    (tmp_path / "a.jsonl").write_text(line + "\n", encoding="utf-8")
    with pytest.raises(BrokenRow, match=r"a\.jsonl row 1: "):
        ChatSource(tmp_path, tmp_path, READING).sample(0)


def test_no_data_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing there"):
        T2ISource(tmp_path / "absent", READING)
    with pytest.raises(InputError, match="without such files"):
        EditSource(tmp_path, READING)
    with pytest.raises(InputError, match="columns other, expected image, captions"):
        T2ISource(write(tmp_path / "a.parquet", [{"other": 1}]), READING)
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(InputError, match="no readable parquet"):
        T2ISource(tmp_path, READING)
    (tmp_path / "a.jsonl").write_text("\n\n")
    with pytest.raises(InputError, match="without a single row"):
        ChatSource(tmp_path / "a.jsonl", tmp_path, READING)


def test_a_pass_reads_each_row_once_across_files(tmp_path: Path) -> None:
    for k in range(3):
        rows = [{"image": png(10 * k + i), "captions": f'["{k} {i}"]'} for i in range(k + 3)]
        write(tmp_path / f"{k}.parquet", rows)
    source: FileSource = T2ISource(tmp_path, READING)
    seen = [source.locate(i) for i in range(len(source))]
    assert len(source) == 12 and len(set(seen)) == 12
    blocks = [block for block, _ in seen]
    assert sum(a != b for a, b in itertools.pairwise(blocks)) == len(set(blocks)) - 1  # a row group is read in one go


def test_recipes_name_sources(tmp_path: Path) -> None:
    vae, vit = READING.vae, READING.vit
    write(tmp_path / "a.parquet", [{"image": png(1), "captions": '["a"]'}])
    assert len(build_source("x", SourceConfig(kind="t2i", path=tmp_path), TOKENIZER, vae, vit, 0)) == 1
    with pytest.raises(ValueError, match="path is of files, and this source is the toybox"):
        SourceConfig(task="t2i", path=tmp_path)
    with pytest.raises(ValueError, match="styles is of the toybox, and this source is of kind t2i"):
        SourceConfig(kind="t2i", path=tmp_path, styles={"terse": 1.0})
    with pytest.raises(InputError, match="no path"):
        build_source("x", SourceConfig(kind="edit"), TOKENIZER, vae, vit, 0)
    with pytest.raises(InputError, match="no task"):
        build_source("x", SourceConfig(), TOKENIZER, vae, vit, 0)


def test_toybox_plans() -> None:
    t2i = ToyboxSource("t2i", TOKENIZER, 0, noise_copies=3).sample(0)
    assert [type(i) for i in t2i] == [Text, VaeImage, VaeImage, VaeImage] and isinstance(t2i[0], Text) and t2i[0].enable_cfg
    assert t2i[1].pixels is t2i[3].pixels and t2i[1].pixels.shape == (64, 64, 3)  # type: ignore[union-attr]
    edit = ToyboxSource("edit", TOKENIZER, 0).sample(0)
    assert [type(i) for i in edit] == [VaeImage, VitImage, Text, VaeImage]
    assert [getattr(i, "loss", False) for i in edit] == [False, False, False, True]
    assert (edit[0].pixels != edit[3].pixels).any()  # type: ignore[union-attr]
    question = ToyboxSource("question", TOKENIZER, 0).sample(0)
    assert [type(i) for i in question] == [VitImage, Text, Text] and question[2].loss and not question[1].loss  # type: ignore[union-attr]


def test_toybox_think_mode_and_repeatability() -> None:
    source = ToyboxSource("t2i", TOKENIZER, 1, think_share=1.0)
    system, prompt, thoughts, image = source.sample(5)
    assert isinstance(system, Text) and isinstance(prompt, Text) and isinstance(thoughts, Text) and isinstance(image, VaeImage)
    assert TOKENIZER.decode(list(system.ids)).startswith("You should first think about the planning process")
    assert TOKENIZER.decode(list(thoughts.ids)).startswith("<think>") and thoughts.loss and thoughts.tied and prompt.enable_cfg
    assert shape(source.sample(5)) == shape(ToyboxSource("t2i", TOKENIZER, 1, think_share=1.0).sample(5))
    assert shape(source.sample(5)) != shape(source.sample(6))
    with pytest.raises(InputError, match="toybox task"):
        ToyboxSource("paint", TOKENIZER, 1)  # type: ignore[arg-type]


def test_plans_may_leave_the_background_to_the_caption() -> None:
    """And nothing else: not how all is drawn, which comes behind it."""
    asked = {"task": "t2i", "tokenizer": TOKENIZER, "seed": 1, "think_share": 1.0}
    told, left = ToyboxSource(**asked), ToyboxSource(**asked, plan_background=False)  # type: ignore[arg-type]
    longer = 0
    for i in range(40):
        one, other = told.sample(i), left.sample(i)
        whole, part = (TOKENIZER.decode(list(sample[2].ids)) for sample in (one, other))  # type: ignore[union-attr]
        found = re.findall(r" The background is [a-z]+\.", whole)
        assert len(found) == 1 and whole.replace(found[0], "") == part
        longer += not whole.replace("</think>", "").endswith(found[0])
        assert TOKENIZER.decode(list(one[1].ids)) == TOKENIZER.decode(list(other[1].ids))  # type: ignore[union-attr]
    assert longer > 0
    for wrong in ({"task": "edit"}, {"think_share": 0.0}):
        with pytest.raises(InputError, match="toybox plan_background: got task"):
            ToyboxSource(**asked | wrong, plan_background=False)  # type: ignore[arg-type]


def test_a_toybox_source_draws_what_its_weights_say() -> None:
    """Of captions what they are about, of edits their kind; without weights of all."""

    def texts(task: str, at: int, **weights: dict[str, float]) -> list[str]:
        source = ToyboxSource(task, TOKENIZER, 3, styles={"terse": 1.0}, **weights)  # type: ignore[arg-type]
        return [TOKENIZER.decode(list(source.sample(i)[at].ids)) for i in range(40)]  # type: ignore[union-attr]

    assert not any(" and " in text for text in texts("t2i", 0, categories={"single": 2.0, "two": 0.0}))
    assert all(" and " in text for text in texts("t2i", 0, categories={"two": 1.0})) and any(" and " in text for text in texts("t2i", 0))
    assert all("background" in text for text in texts("edit", 2, groups={"background": 1.0}))
    assert not all("background" in text for text in texts("edit", 2))
    for task, keys in (("edit", {"categories": {"two": 1.0}}), ("t2i", {"groups": {"tone": 1.0}})):
        with pytest.raises(InputError, match=f"toybox {next(iter(keys))}"):
            ToyboxSource(task, TOKENIZER, 0, **keys)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown categories 'twoo'"):
        SourceConfig(task="t2i", categories={"twoo": 1})
    with pytest.raises(ValueError, match="unknown groups 'style2'"):
        SourceConfig(task="edit", groups={"style2": 1})
