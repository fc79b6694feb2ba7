"""Malformed checkpoints: what may be wrong with index, files, configuration and tokenizer."""

from __future__ import annotations

import json
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

from support.damage import (
    INDEX,
    SINGLE,
    Damage,
    both,
    case,
    config,
    index,
    instead,
    link,
    link_outside,
    remove,
    sparse,
    tokenizer,
    write,
)  # fmt: skip

FILE = r"MODEL/model\.safetensors"
EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"
DEEP = 100_000
NAMES = r"MODEL/model\.safetensors\.index\.json"
CONFIG = r"MODEL/config\.json"
FIRST = "model-00001-of-00008.safetensors"
SHARD = r"MODEL/model-00001-of-00008\.safetensors"
NO_FILE = "which is not a file of the folder"
OUTSIDE = (
    r"is a link to \S+, outside the model folder: put a copy in its place or, if you trust the "
    r"link, set LOWMEM_GBLM_LINKS=\S+"
)


def renamed(change: Any) -> Damage:
    """Another index: what `change` makes of the weight map."""

    def damage(folder: Path) -> None:
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        index(change(weight_map))(folder)

    return damage


def placed(shard: object) -> Damage:
    """An index with one more tensor, in that shard."""
    return renamed(lambda weight_map: {"x": shard} | weight_map)


def twice(folder: Path) -> None:
    """A second name for a shard, and one of its tensors under that name."""
    shards = list(json.loads((folder / INDEX).read_text())["weight_map"].values())
    shard = next(one for one in shards if shards.count(one) > 1)
    link("again.safetensors", shard)(folder)

    def change(weight_map: dict[str, str]) -> dict[str, str]:
        name = next(name for name, one in weight_map.items() if one == shard)
        return weight_map | {name: "again.safetensors"}

    renamed(change)(folder)


INDEXES = [
    replace(one, sharded=True)
    for one in (
        case("no weight map", write(INDEX, "{}"), rf"{NAMES} has no weight_map"),
        case("an empty weight map", index({}), rf"{NAMES} has no weight_map"),
        case("a weight map that is a list", index([FIRST]), rf"{NAMES} has no weight_map"),
        case(
            "an index that is a list",
            write(INDEX, "[]"),
            rf"{NAMES} must hold a JSON object, not .*",
        ),
        case("an empty index", write(INDEX, ""), rf"{NAMES} is not JSON: .*"),
        case(
            "an index of no UTF-8",
            write(INDEX, b'{"\xff": 1}'),
            rf"{NAMES} is not JSON: 'utf-8' .*",
        ),
        case(
            "a deep index", write(INDEX, '{"weight_map":' * DEEP), rf"{NAMES} .* nested too deeply"
        ),
        case("an index with a NaN", write(INDEX, '{"x": NaN}'), rf"{NAMES} .* holds a NaN, .*"),
        case("an index with 1e999", write(INDEX, '{"x": 1e999}'), rf"{NAMES} .* number 1e999, .*"),
        case(
            "a tensor twice in the index",
            write(INDEX, '{"weight_map": {"x": "a", "x": "b"}}'),
            rf"{NAMES} is not JSON: a name occurs twice: x",
        ),
        case(
            "an index of a gigabyte",
            sparse(INDEX, 1 << 30),
            rf"{NAMES} has 1073741824 bytes, more than the \d+ that are read of such a file",
        ),
        case(
            "an index that is a folder", instead(INDEX, Path.mkdir), rf"{NAMES} is a folder, exp.*"
        ),
        case(
            "an index that is a pipe", instead(INDEX, os.mkfifo), rf"{NAMES} is a pipe, expected .*"
        ),
        case("an index elsewhere", link_outside(INDEX), rf"{NAMES} {OUTSIDE}"),
        case(
            "a shard above",
            placed("../x.safetensors"),
            rf"{NAMES} places tensor x in '\.\./x.*', {NO_FILE}",
        ),
        case(
            "an absolute shard",
            placed("/etc/passwd"),
            rf"{NAMES} places tensor x in '/etc/passwd', {NO_FILE}",
        ),
        case("a shard in a folder", placed("a/b"), rf"{NAMES} places tensor x in 'a/b', {NO_FILE}"),
        case(
            "a shard with backslashes",
            placed("..\\x"),
            rf"{NAMES} places tensor x in '\.\.\\+x', {NO_FILE}",
        ),
        case("a shard that is a number", placed(3), rf"{NAMES} places tensor x in 3, {NO_FILE}"),
        case("a shard that is an object", placed({"a": []}), rf"{NAMES} places .*, {NO_FILE}"),
        case(
            "a shard with a zero byte",
            placed("a\0b"),
            rf"{NAMES} names the shard a\\x00b, which is missing",
        ),
        case("a shard of no name", placed(""), rf"{NAMES} names the shard , which is missing"),
        case(
            "a shard that is the folder above",
            placed(".."),
            rf"{NAMES} names the shard \.\., which is missing",
        ),
        case(
            "a shard of 5000 letters",
            placed("a" * 5000),
            rf"{NAMES} names the shard a+…a+ .*, which is missing",
        ),
        case(
            "a shard that forges a message",
            placed("a\n\x1b[2J"),
            rf"{NAMES} names the shard a\\n\\x1b\[2J, .*",
        ),
        case("a missing shard", remove(FIRST), rf"{NAMES} names the shard \S+, which is missing"),
        case(
            "a shard that is a folder",
            instead(FIRST, Path.mkdir),
            rf"{SHARD} is a folder, expected a file",
        ),
        case(
            "a shard that is a pipe",
            instead(FIRST, os.mkfifo),
            rf"{SHARD} is a pipe, expected a file",
        ),
        case(
            "a shard that is a device",
            link(FIRST, "/dev/zero"),
            rf"{SHARD} is a device, expected a file",
        ),
        case("a shard elsewhere", link_outside(FIRST), rf"{SHARD} {OUTSIDE}"),
        case("a shard that links to itself", link(FIRST, FIRST), rf"{SHARD} cannot be read: .*"),
        case(
            "a shard that links to nothing",
            link(FIRST, "gone"),
            rf"{SHARD} is a link to gone, which is missing",
        ),
        case(
            "a shard that is a pickle",
            write(FIRST, pickle.dumps([1] * 99)),
            rf"{SHARD} is no complete safetensors file: .*",
        ),
        case(
            "a shard by two names",
            twice,
            r"tensor \S+ is in two files: \S+\.safetensors and \S+\.safetensors",
        ),
        case(
            "a tensor the shard lacks",
            placed(FIRST),
            r"the index promises x in \S+, whose header does not have it \(1 .*",
        ),
    )
]

FILES = [
    case(
        "only a pickle",
        lambda folder: (folder / SINGLE).rename(folder / "pytorch_model.bin"),
        r"MODEL holds its weights as pickles \(pytorch_model\.bin\), .*save_pretrained\(FOLDER\)",
    ),
    case("no weights", remove(SINGLE), r"MODEL has neither model\.safetensors nor model\.saf.*"),
    case(
        "weights that are a folder",
        instead(SINGLE, Path.mkdir),
        rf"{FILE} is a folder, expected a file",
    ),
    case(
        "weights that are a pipe", instead(SINGLE, os.mkfifo), rf"{FILE} is a pipe, expected a file"
    ),
    case("weights elsewhere", link_outside(SINGLE), rf"{FILE} {OUTSIDE}"),
    case("a read-me elsewhere", link("README.md", "/etc/passwd"), rf"MODEL/README\.md {OUTSIDE}"),
    case(
        "a picture elsewhere",
        both(lambda folder: (folder / "images").mkdir(), link("images/a.png", "/etc/passwd")),
        rf"MODEL/images/a\.png {OUTSIDE}",
    ),
    case(
        "a pipe beside",
        instead("notes.txt", os.mkfifo),
        r"MODEL/notes\.txt is a pipe, expected a file",
    ),
    case("a memory of the kernel beside", link("notes.txt", "/dev/mem"), r"MODEL/notes\.txt .*"),
]

CONFIGS = [
    case("no configuration", remove("config.json"), rf"{CONFIG} is missing"),
    case("an empty configuration", write("config.json", ""), rf"{CONFIG} is not JSON: .*"),
    case(
        "a configuration that is a list",
        write("config.json", "[]"),
        rf"{CONFIG} must hold a JSON object, not a list",
    ),
    case(
        "a deep configuration",
        write("config.json", '{"a":' * DEEP),
        rf"{CONFIG} is not JSON: it is nested too deeply",
    ),
    case(
        "a configuration with 1e999",
        write("config.json", '{"a": -1e999}'),
        rf"{CONFIG} is not JSON: it holds the number -1e999, which is too large",
    ),
    case(
        "a configuration of 5000 digits",
        write("config.json", '{"a": ' + "9" * 5000 + "}"),
        rf"{CONFIG} is not JSON: it holds a number of 5000 digits",
    ),
    case(
        "a configuration with a NaN",
        write("config.json", '{"a": NaN}'),
        rf"{CONFIG} is not JSON: it holds a NaN, which is no number",
    ),
    case(
        "a key twice",
        write("config.json", '{"a": 1, "a": 2}'),
        rf"{CONFIG} is not JSON: a name occurs twice: a",
    ),
    case(
        "a configuration of no UTF-8",
        write("config.json", b'{"\xff": 1}'),
        rf"{CONFIG} is not JSON: 'utf-8' .*",
    ),
    case(
        "a configuration of half a pair",
        write("config.json", '{"\\udfff": 1}'),
        rf"{CONFIG} is not JSON: it holds half of a surrogate pair, .*",
    ),
    case(
        "a configuration of a gigabyte",
        sparse("config.json", 1 << 30),
        rf"{CONFIG} has 1073741824 bytes, more than the 4194304 that .*",
    ),
    case(
        "a configuration that is a pipe",
        instead("config.json", os.mkfifo),
        rf"{CONFIG} is a pipe, expected a file",
    ),
    case("a configuration elsewhere", link("config.json", "/etc/passwd"), rf"{CONFIG} {OUTSIDE}"),
    case(
        "code of its own",
        config(auto_map={"AutoConfig": "code.Config"}),
        rf"{CONFIG} asks for Python code that comes with the checkpoint, which could .*",
    ),
    case(
        "a quantized one",
        config(quantization_config={"quant_method": "gptq\n"}),
        r"MODEL is quantized \(gptq\\n\): prune the original checkpoint, then quantize the result",
    ),
    case(
        "no model type",
        config(model_type=None),
        rf"transformers can make nothing of {CONFIG} \(model_type None\): .*",
    ),
    case(
        "a model type that forges a message",
        config(model_type="x\n\x1b[2J"),
        rf"transformers can make nothing of {CONFIG} \(model_type 'x\\n\\x1b\[2J'\): .*",
    ),
    case(
        "a thousand million blocks",
        config(num_hidden_layers=10**9),
        rf"{CONFIG} says num_hidden_layers is 1000000000, expected at most 2000",
    ),
    case(
        "more blocks than tensors",
        config(num_hidden_layers=31),
        rf"{CONFIG} says there are 31 decoder blocks, more than there are tensors: 30",
    ),
    case(
        "half a block",
        config(num_hidden_layers=0.5),
        r"transformers can make nothing of .*num_hidden_layers.*",
    ),
    case(
        "a width of 10**12",
        config(hidden_size=10**12),
        rf"tensor lm_head\.weight in {FILE} has the shape \[320, 48\], .* \[320, 1000000000000\]",
    ),
    case(
        "a width in words",
        config(hidden_size="wide"),
        r"transformers can make nothing of .*hidden_size.*",
    ),
    case(
        "a vocabulary of 10**15",
        config(vocab_size=10**15),
        rf"tensor lm_head\.weight in {FILE} has the shape \[320, 48\], .* \[10{{15}}, 48\]",
    ),
    case(
        "a feed-forward of 10**12",
        config(intermediate_size=10**12),
        rf"tensor \S+ in {FILE} has the shape .*, the architecture expects .*1000000000000.*",
    ),
    case(
        "heads of 10**10",
        config(head_dim=10**10),
        rf"tensor \S+ in {FILE} has the shape .*, the architecture expects .*0000000000.*",
    ),
    case(
        "10**15 positions",
        config(max_position_embeddings=10**15),
        rf"{CONFIG} says max_position_embeddings is 10+, expected at most \d+",
    ),
    case(
        "10**12 labels",
        config(num_labels=10**12),
        rf"{CONFIG} says num_labels is 1000000000000, expected at most 100000",
    ),
    case(
        "a method of the configuration",
        config(get_text_config="x"),
        rf"transformers can make nothing of {CONFIG} .*",
    ),
    case(
        "blocks deep within",
        config(text_config={"a": [{"n_layer": 10**9}]}),
        rf"{CONFIG} says n_layer is 1000000000, expected at most 2000",
    ),
]

NO_TOKENIZER = "MODEL has no usable tokenizer:"


LOST_TOKEN = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<lost>", "type_id": 0}}],
    "pair": [],
    "special_tokens": {},
}


REMOTE = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["code.Own", None]}}

TOKENIZERS = [
    case(
        "no tokenizer",
        both(remove("tokenizer.json"), remove("tokenizer_config.json")),
        r"MODEL has no tokenizer: there is no tokenizer\.json, .* where the model came from",
        method="wanda",
    ),
    *(
        case(name, damage, f"{NO_TOKENIZER} .+", method="wanda")
        for name, damage in {
            "an empty tokenizer": write("tokenizer.json", ""),
            "half a tokenizer": write("tokenizer.json", '{"version": "1.0", "model": {'),
            "a deep tokenizer": write("tokenizer.json", "[" * DEEP),
            "a tokenizer of no UTF-8": write("tokenizer.json", b"\xff\xfe"),
            "a tokenizer that is a list": write("tokenizer.json", "[]"),
            "a vocabulary that is a number": tokenizer(
                model={"type": "BPE", "vocab": 3, "merges": []}
            ),
            "a template without its token": tokenizer(post_processor=LOST_TOKEN),
            "a configuration of the tokenizer that is a list": write("tokenizer_config.json", "[]"),
            "a deep configuration of the tokenizer": write("tokenizer_config.json", "[" * DEEP),
            "a token that is a number": write("tokenizer_config.json", '{"bos_token": 3}'),
            "a class that is a number": write("tokenizer_config.json", '{"tokenizer_class": 3}'),
            "a tokenizer of a gigabyte": sparse("tokenizer.json", 1 << 30),
        }.items()
    ),
]
TOKENIZERS += [
    case(
        "a tokenizer with code of its own",
        write("tokenizer_config.json", json.dumps(REMOTE)),
        "MODEL/tokenizer_config.json asks for Python code that comes with the checkpoint, .*",
        method="wanda",
    ),
]
