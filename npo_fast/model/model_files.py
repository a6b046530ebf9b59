"""The files of a model: where a name leads, whether they are whole, and what identifies them."""

from hashlib import sha256
from pathlib import Path
from typing import TypedDict

from safetensors import safe_open
from transformers.utils.hub import cached_file

from npo_fast.boundary import read_json
from npo_fast.errors import UserError, reading
from npo_fast.model.adapters import ADAPTER_CONFIG, adapter_base
from npo_fast.model.manifest import MANIFEST, DamagedError, read_manifest, sha256_of_file
from npo_fast.model.shard_files import SHARDS
from npo_fast.offline import hub
from npo_fast.run_files import read_metadata


class _ShardIndex(TypedDict):
    weight_map: dict[str, str]


def model_folder(name: str) -> str:
    """The model of a run, or the name itself."""
    path = Path(name)
    if (path / "run.json").is_file() and (path / "model").is_dir():
        return str(path / "model")
    return name


def source_of(name: str) -> dict[str, str]:
    """The arguments of ``from_pretrained``: a hub name or folder, and a GGUF file in it."""
    name = model_folder(name)
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"no GGUF file {name!r}")
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    if (path / "run.json").is_file() and not (path / "config.json").exists():
        if moved := read_metadata(path).get("moved_to"):
            raise UserError(f"the run in {name!r} went on in {moved}: name that")
        raise UserError(
            f"the run in {name!r} has no model yet: the command that began it goes on, or name one "
            f"of its checkpoints in {path / 'checkpoints'}"
        )
    if path.is_dir() and not any((path / n).exists() for n in ("config.json", ADAPTER_CONFIG)):
        files = sorted(path.glob("*.gguf"))
        if len(files) != 1:
            raise UserError(
                f"{name!r} holds no config.json and {len(files)} GGUF files; "
                "name a model folder or one .gguf file"
            )
        return {"pretrained_model_name_or_path": name, "gguf_file": files[0].name}
    if not path.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise UserError(f"no model folder {name!r}")
    return {"pretrained_model_name_or_path": name}


def check_weights(name: str) -> None:
    """Checks the weight files of a folder without reading them: they are there, and whole.

    Raises:
        UserError: a file is missing, or is not what its header says.
    """
    folder = Path(model_folder(name))
    if not folder.is_dir() or "gguf_file" in source_of(name):
        return
    if (folder / ADAPTER_CONFIG).is_file():
        check_weights(adapter_base(folder))
    found = {path.name for path in folder.glob("*.safetensors")}
    for index in folder.glob("*.index.json"):
        named = {*read_json(index, _ShardIndex)["weight_map"].values()}
        if missing := sorted(file for file in named if not (folder / file).is_file()):
            raise UserError(f"{folder} has no {missing[0]}, which {index.name} names")
    shards = (folder / SHARDS).is_dir()  # of several processes, in a checkpoint
    if not found and not shards and not any(folder.glob("*.bin")):
        raise UserError(f"{name!r} holds no weights: no .safetensors, .bin or .gguf file")
    for file in sorted(found):
        with (
            reading(folder / file, "download or save it again"),
            safe_open(folder / file, framework="pt"),
        ):
            pass


def largest_shard(name: str) -> int | None:
    """Bytes of the largest file of weights, where a model comes in several."""
    folder = Path(model_folder(name))
    shards = [file.stat().st_size for file in folder.glob("model-*-of-*.safetensors")]
    return max(shards, default=None)


def files_fingerprint(name: str) -> str:
    """SHA-256 of the files that a model is loaded from: weights and config, and an adapter's base.

    It is the same in every dtype, on every device and wherever the folder lies. A hub name's files
    are those of its snapshot on this machine, so load the model first.
    """
    folder = Path(model_folder(name))
    base = ""
    if folder.is_file() or "gguf_file" in (source := source_of(name)):
        files = [folder if folder.is_file() else folder / source["gguf_file"]]
    else:
        if not folder.is_dir():
            with hub(repr(name)):
                folder = Path(str(cached_file(name, "config.json"))).parent
        if (folder / ADAPTER_CONFIG).is_file():
            base = files_fingerprint(adapter_base(folder))
        files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors"))
        files = files or sorted(folder.glob("*.bin")) or sorted(folder.glob(f"{SHARDS}/*.distcp"))
        files += [path for n in ("config.json", ADAPTER_CONFIG) if (path := folder / n).is_file()]
    try:
        listed = read_manifest(folder)["files"] if (folder / MANIFEST).is_file() else {}
        named = {path.relative_to(folder).as_posix(): path for path in files}
        sums = [
            listed[name]["sha256"] if name in listed else sha256_of_file(path)
            for name, path in named.items()
        ]
    except DamagedError as error:
        raise UserError(str(error)) from error
    return sha256("".join([base, *sums]).encode()).hexdigest()
