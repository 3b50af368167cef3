"""Where a model comes from: the package itself, a folder, the Hugging Face cache, or the hub."""

import json
import threading
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

BUNDLED = "tiny-dialog"
BUNDLED_FOLDER = Path(__file__).parent / "tiny_dialog"

# transformers' own retries take 26 s to find out that the hub is unreachable.
HUB_TIMEOUT_S = 4.0

WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


class ModelError(Exception):
    """A model cannot be loaded. One line gives its name, what was tried and the remedy."""


class Source(NamedTuple):
    """Where a model is, in the terms of `from_pretrained`."""

    name: str  # as given, but with an absolute folder, since replicas may run elsewhere
    place: str  # a folder or a hub id
    options: dict[str, Any]

    @property
    def served_name(self) -> str:
        """The name that clients see: only the last part of a folder, since its path is private."""
        if self.name == BUNDLED or not Path(self.place).is_dir():
            return self.name
        return ":".join([Path(self.place).name, *self.options.values()])

    @property
    def is_remote(self) -> bool:
        """Whether the model must be downloaded from the hub first."""
        return not self.options.get("local_files_only") and not Path(self.place).is_dir()

    def problem(self, what: str, error: Exception | None = None) -> ModelError:
        reason = f"{what} ({first_line(error)})" if error else what
        return ModelError(
            f"model {self.name!r}: {reason}; tried {self.place!r}; give a hub id, a folder with a "
            "causal language model, or <folder or hub id>:<file>.gguf"
        )


def resolve(name: str) -> Source:
    """Find a model. Asking the hub takes up to HUB_TIMEOUT_S. Raises ModelError."""
    place, _, gguf_file = name.rpartition(":") if name.endswith(".gguf") else (name, "", "")
    weights = (gguf_file,) if gguf_file else WEIGHTS
    options = {"gguf_file": gguf_file} if gguf_file else {}
    source = Source(name, place, options)
    if not place:
        raise source.problem("a GGUF file needs the folder or hub id that holds it before a colon")
    if name == BUNDLED:
        return Source(name, str(BUNDLED_FOLDER), options)
    try:
        folder = Path(place).expanduser().resolve()
        is_folder = folder.is_dir()
    except (OSError, RuntimeError) as error:  # the name is too long, or its user does not exist
        raise source.problem("neither a folder nor a hub id", error) from None
    if is_folder:
        if not any((folder / file).is_file() for file in weights):
            raise source.problem(f"the folder {folder} has no {' or '.join(weights)}")
        return Source(f"{folder}:{gguf_file}" if gguf_file else str(folder), str(folder), options)
    if place.startswith((".", "/", "~")) or place.count("/") > 1:
        raise source.problem(f"there is no folder {folder}")
    try:
        cached = any(is_cached(place, file) for file in weights)
    except HFValidationError as error:
        raise source.problem("neither a folder nor a hub id", error) from None
    if cached:
        return Source(name, place, options | {"local_files_only": True})
    if problem := hub_problem(place):
        raise ModelError(
            f"model {name!r}: neither in the Hugging Face cache nor available from the hub "
            f"({first_line(problem)}); tried for up to {HUB_TIMEOUT_S:.0f} s; connect to the hub "
            "once (a private model also needs HF_TOKEN), or name the folder of a model at hand"
        )
    return source


def is_cached(hub_id: str, file: str) -> bool:
    """Whether weights are in the Hugging Face cache, including all parts that an index names."""
    path = try_to_load_from_cache(hub_id, file)
    if not isinstance(path, str):
        return False
    if not file.endswith(".index.json"):
        return True
    parts = set(json.loads(Path(path).read_text())["weight_map"].values())
    return all(is_cached(hub_id, part) for part in parts)


def hub_problem(hub_id: str) -> Exception | None:
    """Return, within HUB_TIMEOUT_S, why the hub cannot deliver a model; None if it can."""
    answer: SimpleQueue[Exception | None] = SimpleQueue()

    def ask() -> None:
        try:
            HfApi().model_info(hub_id, timeout=HUB_TIMEOUT_S)
            answer.put(None)
        except Exception as error:
            answer.put(error)

    # Looking up the hub's address has no time limit. If it hangs, the thread is abandoned.
    threading.Thread(target=ask, daemon=True).start()
    try:
        return answer.get(timeout=HUB_TIMEOUT_S)
    except Empty:
        return TimeoutError(f"no answer within {HUB_TIMEOUT_S:.0f} s")


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
