"""Published sparse autoencoders, each in its authors' layout: Qwen-Scope, Gemma Scope 2, sparsify, dictionary_learning.

A layout is recognised by the fields of the configuration and the tensors of the weights, never by a file's name alone;
a file's name only says where to look, and which decoder block was read where nothing inside says so. What is not
understood is refused by name. SAELens' own folders are handed to `saelens`.

Authors count decoder blocks from 0, so "layer n" of theirs is layer n + 1 here: `hidden_states[n + 1]`.
"""

import json
import logging
import os
import pickle
import re
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from transformers.utils import cached_file

from .configuration_segcompass import SparseAutoencoderConfig
from .manifest import check
from .sae_activations import SAE_ACTIVATIONS
from .saelens import fold_input_bias, load_saelens, put_weights
from .saved_folders import HUB_KEYWORDS
from .weights import check_finite, tensor_names

if TYPE_CHECKING:
    from .modeling_sparse_autoencoder import SparseAutoencoder

    Autoencoder = TypeVar("Autoencoder", bound=SparseAutoencoder)

logger = logging.getLogger(__name__)

WEIGHTS = (".safetensors", ".pt")
BESIDE = ("sparsity.safetensors", "mean_active_activation.safetensors")
"""Files of tensors that are no autoencoder."""
CONFIGS = ("cfg.json", "config.json")
WHOLE = ("k", "group_sizes")
"""Tensors of whole numbers."""

TRAINING_FIELDS = {
    *("trainer_class", "wandb_name", "device", "steps", "seed", "lr", "warmup_steps", "decay_start", "resample_steps"),
    *("l1_penalty", "sparsity_penalty", "sparsity_warmup_steps", "sparsity_function", "sparsity_queue_length"),
    *("p_start", "p_end", "anneal_start", "n_sparsity_updates", "bandwidth", "target_l0", "auxk_alpha", "top_k_aux"),
    *("threshold_beta", "threshold_start_step", "k_anneal_steps", "group_fractions", "group_weights", "norm_factor"),
}
"""Fields of dictionary_learning's trainers that change nothing of what the trained autoencoder computes."""


class Files(NamedTuple):
    """One published autoencoder, on this machine."""

    weights: Path
    """The file of its tensors."""
    configs: dict[Path, dict[str, Any]]
    """The JSON files beside it, by path; empty where there is none."""
    above: Path | None
    """config.json of the folder above, where sparsify notes the model; None where there is none."""
    name: str
    """Where it was found: a path, or one in a repository (`ORG/REPO/layer3.sae.pt`)."""


class Published(NamedTuple):
    """What a layout makes of its files."""

    tensors: dict[str, torch.Tensor]
    """By our names, in our shapes."""
    block: int | None
    """The decoder block whose output it reads, from 0; None where the files do not say."""
    fields: dict[str, Any]
    """For `SparseAutoencoderConfig`: the activation, and where it comes from."""
    subtracts: bool
    """Whether b_dec is subtracted from the hidden states before they are encoded."""


def load_public(
    sae_class: "type[Autoencoder]",
    source: str | Path,
    layer: int | None = None,
    k: int | None = None,
    dtype: str = "float32",
    revision: str | None = None,
    **hub: Any,
) -> "Autoencoder":
    """Load a published SAE, see `SparseAutoencoder.from_public`.

    Args:
        sae_class: `SparseAutoencoder`, or a subclass of it.
        source: folder, file, or place on the Hub.
        layer: L, which of several; or what the files do not say.
        k: features a token keeps, where the files do not say.
        dtype: name of the weights' dtype.
        revision: branch, tag or commit on the Hub.
        **hub: how to reach it, names in `HUB_KEYWORDS`.

    Returns:
        An autoencoder that computes what the authors' code does.

    Raises:
        ValueError: see `SparseAutoencoder.from_public`.
        OSError: there is no such file, or the Hub cannot be reached.
    """
    if unknown := hub.keys() - set(HUB_KEYWORDS):
        raise ValueError(f"{', '.join(sorted(unknown))} is no option of from_public; choose from {HUB_KEYWORDS}.")
    if layer is not None and layer < 1:
        raise ValueError(
            f"layer is {layer}; layers count from 1 here: the output of block n, counted from 0, is layer n + 1."
        )
    files = _find(str(source), layer, revision, hub)
    layout = _layout_of(files)
    check(files.weights.parent, (files.weights.suffix, ".json"), missing=False)
    if layout is None:
        return _from_saelens(sae_class, files, layer, k, dtype)
    found = layout(files, _read_tensors(files.weights))
    fields = found.fields | {"layer": _layer(files, found.block, layer), "k": _k(files, found.fields, k)}
    d_in, d_sae = len(found.tensors["b_dec"]), len(found.tensors["b_enc"])
    sae = sae_class(SparseAutoencoderConfig(d_in=d_in, d_sae=d_sae, **fields))
    put_weights(sae, found.tensors, files.name)
    if found.subtracts:
        fold_input_bias(sae)
    check_finite(sae, files.name)
    logger.warning(
        "%s: published SAEs saw text only, and come without mean activations, by which concepts are ranked; measure "
        "both on your images before you rely on it (docs/sae.md, Published SAEs).",
        files.name,
    )
    return sae.to(getattr(torch, dtype)).eval()


# -- finding the files -------------------------------------------------------------------------------------------------


def _find(source, layer, revision, hub):
    """The files of one autoencoder, fetched if they are on the Hub."""
    path = Path(source)
    if path.exists():
        root, within = (path, "") if path.is_dir() else (path.parent, path.name)
        if within:  # a file beside others; its siblings are its configuration
            listed = sorted(file.name for file in root.iterdir() if file.is_file())
        else:
            listed = sorted(file.relative_to(root).as_posix() for file in root.rglob("*") if file.is_file())
        chosen = _choose(listed, within, layer, source)

        def fetch(name):
            return root / name

        name = str(root / chosen)
        above = root / PurePosixPath(chosen).parent / ".." / "config.json"
        above = above if above.is_file() else None
    else:
        found = re.fullmatch(r"(?:hf://)?(?:models/)?([\w.-]+/[\w.-]+)(?:@([\w.-]+))?/?(.*?)/?", source)
        if found is None or os.path.isabs(source) or source.startswith("."):
            raise OSError(
                f"{source} is no folder or file here, and no place on the Hub; write ORG/REPO, ORG/REPO/FOLDER or "
                "hf://ORG/REPO/FILE."
            )
        repo, at, within = found[1], found[2], found[3]
        if at and revision and at != revision:
            raise ValueError(f"{source} names the revision {at}, revision= another ({revision}); give one of them.")
        revision = at or revision
        listed = _listed(repo, revision, hub)
        chosen = _choose(listed, within, layer, source)

        def fetch(name):
            return Path(str(cached_file(repo, name, revision=revision, **hub)))

        name = f"{repo}/{chosen}"
        parent = PurePosixPath(chosen).parent.parent / "config.json"
        above = fetch(parent.as_posix()) if parent.as_posix() in listed and "/" in chosen else None
    beside = [(PurePosixPath(chosen).parent / config).as_posix() for config in CONFIGS]
    configs = [fetch(config) for config in beside if config in listed]
    return Files(
        weights=fetch(chosen),
        configs={config: _json(config) for config in configs},
        above=above,
        name=name,
    )


def _listed(repo, revision, hub):
    """The paths of a repository's files; of those in the cache where the Hub cannot be reached."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    why = "local_files_only=True"
    if not hub.get("local_files_only"):
        try:
            return HfApi().list_repo_files(repo, revision=revision, token=hub.get("token"))
        except HfHubHTTPError as error:  # there is no such repository, it is gated, ...: the Hub's own words
            raise OSError(f"{repo} cannot be read from the Hub: {error}") from error
        except Exception as error:  # each HTTP client has its own class of "no network"
            why = f"{type(error).__name__}: {error}"
    try:
        folder = snapshot_download(repo, revision=revision, cache_dir=hub.get("cache_dir"), local_files_only=True)
    except LocalEntryNotFoundError as error:
        raise OSError(
            f"{repo} is no folder here, cannot be reached on the Hub ({why}), and is not in the cache of this machine; "
            f"fetch it where there is a network (hf download {repo} --local-dir FOLDER), and name that folder."
        ) from error
    return sorted(file.relative_to(folder).as_posix() for file in Path(folder).rglob("*") if file.is_file())


def _choose(listed, within, layer, source):
    """The one weights file that is meant, among the paths of a folder or repository."""
    if within in listed:
        return within
    inside = [name for name in listed if not within or name.startswith(f"{within}/")]
    weights = [name for name in inside if name.endswith(WEIGHTS) and PurePosixPath(name).name not in BESIDE]
    depth = len(PurePosixPath(within).parts) + 1
    candidates = [name for name in weights if len(PurePosixPath(name).parts) == depth] or weights
    if not candidates:
        held = ", ".join(inside[:5]) or "nothing"
        raise OSError(
            f"{source} holds no file of tensors ({' or '.join(WEIGHTS)}), but {held}; name the folder or the file of "
            "an SAE."
        )
    if layer is not None and len(candidates) > 1:
        blocks = {name: _block_in(name) for name in candidates}
        candidates = [name for name, block in blocks.items() if block == layer - 1]
        if not candidates:
            layers = sorted({block + 1 for block in blocks.values() if block is not None})
            raise ValueError(
                f"{source} holds no SAE of layer {layer} (of block {layer - 1}, counted from 0); its layers are "
                f"{layers}."
            )
    if len(candidates) > 1:
        raise ValueError(
            f"{source} holds {len(candidates)} SAEs: {', '.join(candidates[:8])}{', ...' * (len(candidates) > 8)}; "
            f"name one, as {source.rstrip('/')}/{candidates[0]}, or a layer that has one only."
        )
    return candidates[0]


def _block_in(name):
    """The decoder block, from 0, that a path names last: layer3.sae.pt, layer_3_width_16k, layers.3, layer_3/..."""
    found = re.findall(r"layers?[._]?(\d+)", name)
    return int(found[-1]) if found else None


def _json(path):
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); fetch or copy it again.") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds a {type(fields).__name__}, where fields are needed; fetch or copy it again.")
    return fields


def _read_tensors(path):
    """The tensors of a safetensors file, or of a pickle of nothing but tensors."""
    from safetensors.torch import load_file

    with open(path, "rb") as file:
        head = file.read(64)
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a pointer of Git LFS, not the tensors; fetch it with `git lfs pull` or `hf`.")
    if head[:2] != b"PK" and head[:1] != b"\x80":
        tensor_names(path)
        return load_file(path)
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, IndexError) as error:
        raise ValueError(
            f"{path} is damaged, or holds more than tensors ({str(error).splitlines()[0]}). Nothing was loaded or run; "
            "fetch it again."
        ) from error
    if not isinstance(tensors, dict) or not all(torch.is_tensor(tensor) for tensor in tensors.values()):
        raise ValueError(f"{path} is no dictionary of tensors; name the file of one SAE.")
    return tensors


# -- recognising the layout --------------------------------------------------------------------------------------------


def _layout_of(files: Files) -> "Callable[[Files, dict[str, torch.Tensor]], Published] | None":
    """The function that reads this layout; None for SAELens'."""
    for fields in files.configs.values():
        if fields.get("model_type") == SparseAutoencoderConfig.model_type:
            raise ValueError(f"{files.name} was saved by this project; load it with from_pretrained.")
        if _config_named(fields):
            return LAYOUTS[_config_named(fields)]
    if files.configs:
        path, fields = next(iter(files.configs.items()))
        raise ValueError(
            f"{path} has the fields {', '.join(sorted(fields))}, which are those of no layout that is known "
            f"({', '.join(LAYOUTS)})."
        )
    return _qwen_scope


def _config_named(fields):
    """Whose configuration has these fields; None if nobody's."""
    if isinstance(fields.get("trainer"), dict):
        return "dictionary_learning"
    if "hf_hook_point_in" in fields:
        return "Gemma Scope 2"
    if "d_in" in fields and "d_sae" in fields:
        return "SAELens"
    if "d_in" in fields and ("num_latents" in fields or "expansion_factor" in fields):
        return "sparsify"
    return None


def _fields_of(files, name):
    return next((path, fields) for path, fields in files.configs.items() if _config_named(fields) == name)


def _checked(files, layout, tensors, shapes, optional=()):
    """The tensors, after their names, dtypes and shapes were compared with the layout's.

    `shapes` has for each name its sides: s is d_sae, d is d_in, and * stands for any shape. The first name with the one
    side "s", and the first with "d", are the biases, whose lengths say how many that is.
    """
    needed = shapes.keys() - set(optional)
    for what, names in (("lacks", needed - tensors.keys()), ("also holds", tensors.keys() - shapes.keys())):
        if names:
            raise ValueError(
                f"{files.name} {what} {', '.join(sorted(names))}; an SAE in the layout of {layout}"
                f"{_beside(files)} has {', '.join(shapes)}. {_other_layout(tensors)}"
            )
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_floating_point() == (name in WHOLE) or tensor.is_complex():
            raise ValueError(
                f"{files.name} holds {name} as {tensor.dtype} ({tensor.layout}); it is damaged or quantised."
            )
    sides = {}
    for letter in "sd":
        bias = next(name for name, shape in shapes.items() if shape == letter)
        if tensors[bias].dim() != 1:
            raise ValueError(
                f"{files.name} holds {bias} of shape {tuple(tensors[bias].shape)}; one dimension is needed."
            )
        sides[letter] = len(tensors[bias])
    for name, tensor in tensors.items():
        if shapes[name] == "*":
            continue
        shape = tuple(sides[letter] for letter in shapes[name])
        if tuple(tensor.shape) != shape:
            turned = " It is transposed." if tuple(tensor.shape) == shape[::-1] else ""
            raise ValueError(
                f"{files.name} holds {name} of shape {tuple(tensor.shape)}; its biases and the layout of {layout} mean "
                f"{shape}.{turned} Fetch the file again."
            )
    return tensors


def _beside(files):
    names = ", ".join(path.name for path in files.configs)
    return f" ({names} beside it says so)" if names else " (no configuration lies beside it)"


def _other_layout(tensors):
    """A sentence where the names are another layout's."""
    others = {
        "Gemma Scope 2": {"w_enc", "w_dec"},
        "sparsify": {"encoder.weight", "W_dec"},
        "dictionary_learning": {"encoder.weight", "decoder.weight"},
        "Qwen-Scope, SAELens or dictionary_learning": {"W_enc", "W_dec"},
    }
    whose = next((name for name, names in others.items() if names <= tensors.keys()), None)
    return f"Its names are those of {whose}; take weights and configuration from one SAE." if whose else ""


def _agree(files, **values):
    """Refuse what two places say differently: name -> (what the configuration says, what the tensors say)."""
    for name, (said, held) in values.items():
        if said is not None and said != held:
            raise ValueError(
                f"{files.name}: its configuration says {name}={said!r}, its tensors {held!r}; take both from one SAE."
            )


def _layer(files, block, layer):
    """L, from what the files say and what was asked for."""
    if block is None and layer is None:
        raise ValueError(
            f"{files.name} does not say which decoder block it reads; say so with layer=, counted from 1: the output "
            "of block n, counted from 0, is layer n + 1."
        )
    if block is not None and layer is not None and block + 1 != layer:
        raise ValueError(
            f"{files.name} reads the output of block {block}, counted from 0, which is layer {block + 1} here; layer "
            f"is {layer}."
        )
    return layer if block is None else block + 1


def _k(files, fields, k):
    """How many features a token keeps, from what the files say and what was asked for."""
    said = fields.get("k")
    if said is None and SAE_ACTIVATIONS[fields["activation"]].keeps_k:
        if k is None:
            raise ValueError(
                f"{files.name} does not say how many features a token keeps; say so with k= (L0_50: k=50)."
            )
        return k
    if k is not None and k != said:
        raise ValueError(f"k is {k}, but {files.name} has k={said}, activation {fields['activation']!r}; leave k out.")
    return 64 if said is None else said  # which the other activations do not read


# -- the layouts -------------------------------------------------------------------------------------------------------


def _from_saelens(sae_class, files, layer, k, dtype):
    if files.weights.name != "sae_weights.safetensors" or "cfg.json" not in {path.name for path in files.configs}:
        raise ValueError(
            f"{files.name} has a configuration of SAELens' beside it, but SAELens' files are cfg.json and "
            f"sae_weights.safetensors. {_other_layout(_read_tensors(files.weights))}"
        )
    sae = load_saelens(sae_class, files.weights.parent, layer, dtype)
    if k is not None and not (sae.activation.keeps_k and sae.config.k == k):
        raise ValueError(f"k is {k}, but {files.name} says what it keeps itself; leave k out.")
    return sae


def _qwen_scope(files, tensors):
    """`layer{n}.sae.pt`: W_enc (d_sae, d_in), W_dec (d_in, d_sae), b_enc, b_dec. The repository's name says the rest.

    The authors keep the k largest pre-activations, negative ones too; here those count as 0. Both are the same wherever
    k pre-activations are positive.
    """
    tensors = _checked(files, "Qwen-Scope", tensors, {"W_enc": "sd", "W_dec": "ds", "b_enc": "s", "b_dec": "d"})
    fields: dict[str, Any] = {"activation": "topk"}
    where = f"{files.name}\n{files.weights.resolve()}\n{os.path.abspath(files.weights)}"
    if named := re.search(r"SAE-Res-([\w.-]+?)-W(\d+)K-L0_(\d+)", where):
        fields |= {"backbone": f"Qwen/{named[1]}", "k": int(named[3])}
        _agree(files, d_sae=(int(named[2]) * 1024, len(tensors["b_enc"])))
    numbered = re.fullmatch(r"layer(\d+)\.sae\.pt", PurePosixPath(Path(files.name).as_posix()).name)
    tensors = tensors | {name: tensors[name].T for name in ("W_enc", "W_dec")}
    return Published(tensors, int(numbered[1]) if numbered else None, fields, subtracts=False)


def _gemma_scope_2(files, tensors):
    """`params.safetensors` and `config.json`, whose `hf_hook_point_in` is `model.layers.{n}.output`."""
    path, fields = _fields_of(files, "Gemma Scope 2")
    known = {"hf_hook_point_in", "hf_hook_point_out", "width", "model_name", "architecture", "l0", "type"}
    _refuse_unknown(path, fields, known | {"affine_connection"})
    hook, out = fields["hf_hook_point_in"], fields.get("hf_hook_point_out")
    read = re.fullmatch(r"(?:\w+\.)*layers\.(\d+)\.output", hook) if isinstance(hook, str) else None
    wrong = {
        "architecture": fields.get("architecture") != "jump_relu",
        "type": fields.get("type", "sae") != "sae",
        "affine_connection": bool(fields.get("affine_connection")),
        "hf_hook_point_in": read is None,
        "hf_hook_point_out": out not in (None, "", hook),
    }
    for name, refused in wrong.items():
        if refused:
            raise ValueError(
                f"{path} has {name}={fields.get(name)!r}; only JumpReLU SAEs that read and rebuild the output of one "
                "decoder block (folders resid_post and resid_post_all) can be loaded."
            )
    shapes = {"w_enc": "ds", "w_dec": "sd", "b_enc": "s", "b_dec": "d", "threshold": "s"}
    tensors = _checked(files, "Gemma Scope 2", tensors, shapes)
    _agree(files, width=(fields.get("width"), len(tensors["b_enc"])))
    block = int(read[1])
    folder = re.search(r"layer_(\d+)_width_", files.name)
    if folder and int(folder[1]) != block:
        raise ValueError(f"{path} says block {block}, the folder's name block {folder[1]}; take both from one SAE.")
    model = fields.get("model_name")
    if isinstance(model, str):
        model = model.replace("gemma-v3", "gemma-3")
        model = model if "/" in model else f"google/{model}"
        model = model.removesuffix("-pt") if "270m" in model else model  # which on the Hub has no suffix
    tensors = {name.replace("w_", "W_"): tensor for name, tensor in tensors.items()}
    return Published(tensors, block, {"activation": "jumprelu", "backbone": model}, subtracts=False)


def _sparsify(files, tensors):
    """`sae.safetensors` and `cfg.json` in a folder that is named after the module, as `layers.{n}`."""
    path, fields = _fields_of(files, "sparsify")
    known = {"d_in", "num_latents", "expansion_factor", "k", "activation", "multi_topk", "normalize_decoder"}
    _refuse_unknown(path, fields, known | {"signed", "transcode", "skip_connection"})
    for name, value in (("activation", "topk"), ("signed", False), ("transcode", False), ("skip_connection", False)):
        if fields.get(name, value) != value:
            raise ValueError(f"{path} has {name}={fields[name]!r}; only {value!r} can be loaded.")
    if not isinstance(fields.get("k"), int):
        raise ValueError(f"{path} has k={fields.get('k')!r}; the number of features that a token keeps is needed.")
    shapes = {"encoder.weight": "sd", "encoder.bias": "s", "W_dec": "sd", "b_dec": "d"}
    tensors = _checked(files, "sparsify", tensors, shapes)
    wide = fields.get("num_latents") or fields["d_in"] * fields.get("expansion_factor", 32)
    _agree(files, d_in=(fields["d_in"], len(tensors["b_dec"])), num_latents=(wide, len(tensors["encoder.bias"])))
    place = Path(files.name).parent.name
    block = re.fullmatch(r"(?:\w+\.)*(?:layers|h)[._](\d+)", place)
    if block is None and re.search(r"layers?[._]?\d|embed", place):
        raise ValueError(
            f"{files.name} reads {place!r}, which is not the output of a decoder block; name a folder such as "
            "layers.12."
        )
    tensors = {
        "W_enc": tensors["encoder.weight"].T,
        "b_enc": tensors["encoder.bias"],
        "W_dec": tensors["W_dec"],
        "b_dec": tensors["b_dec"],
    }
    run = _json(files.above) if files.above else {}
    described = {"activation": "topk", "k": fields["k"], "backbone": run.get("model")}
    described |= {"dataset": run.get("dataset"), "token_window": run.get("ctx_len")}
    return Published(tensors, int(block[1]) if block else None, described, subtracts=True)


LINEAR = {"encoder.weight": "sd", "encoder.bias": "s", "decoder.weight": "ds"}
MATRICES = {"W_enc": "ds", "b_enc": "s", "W_dec": "sd", "b_dec": "d"}
KEPT = {"k": "*", "threshold": "*"}


class _Dictionary(NamedTuple):
    """A class of dictionary_learning."""

    activation: str
    shapes: dict[str, str]
    subtracts: bool
    optional: Sequence[str] = ()


DICTIONARIES = {
    "AutoEncoder": _Dictionary("relu", LINEAR | {"bias": "d"}, True),
    "AutoEncoderNew": _Dictionary("relu", LINEAR | {"decoder.bias": "d"}, False),
    "AutoEncoderTopK": _Dictionary("topk", LINEAR | {"b_dec": "d"} | KEPT, True, ("k", "threshold")),
    "BatchTopKSAE": _Dictionary("batchtopk", LINEAR | {"b_dec": "d"} | KEPT, True, ("k",)),
    "MatryoshkaBatchTopKSAE": _Dictionary("matryoshka", MATRICES | KEPT | {"group_sizes": "*"}, True, ("k",)),
    "JumpReluAutoEncoder": _Dictionary("jumprelu", MATRICES | {"threshold": "s"}, False),
}
"""`dict_class` of dictionary_learning's config.json -> what it is."""


def _dictionary_learning(files, tensors):
    """`ae.pt` and `config.json`, whose `trainer.dict_class` says what is in it and `trainer.layer` where it reads."""
    path, whole = _fields_of(files, "dictionary_learning")
    trainer, buffer = whole["trainer"], whole.get("buffer") or {}
    known = {"dict_class", "activation_dim", "dict_size", "k", "layer", "lm_name", "submodule_name", "group_sizes"}
    _refuse_unknown(path, trainer, known | TRAINING_FIELDS)
    kind = DICTIONARIES.get(trainer.get("dict_class"))
    if kind is None:
        raise ValueError(
            f"{path} has dict_class={trainer.get('dict_class')!r}; {', '.join(DICTIONARIES)} can be loaded."
        )
    place = trainer.get("submodule_name")
    if buffer.get("io", "out") != "out" or (place and not re.fullmatch(r"(resid_post|layer)(_layer)?(_\d+)?", place)):
        raise ValueError(
            f"{path} was trained at {place!r}, io={buffer.get('io')!r}; only the output of a decoder block "
            "(resid_post, 'out') can be loaded."
        )
    block = trainer.get("layer")
    if place and (number := re.search(r"\d+$", place)) and block is not None and int(number[0]) != block:
        raise ValueError(f"{path} has layer={block!r}, but submodule_name={place!r}; they contradict each other.")
    layout = f"dictionary_learning's {trainer['dict_class']}"
    tensors = _checked(files, layout, tensors, kind.shapes, kind.optional)
    held = {letter: len(tensors[next(n for n, shape in kind.shapes.items() if shape == letter)]) for letter in "sd"}
    _agree(
        files,
        activation_dim=(trainer.get("activation_dim"), held["d"]),
        dict_size=(trainer.get("dict_size"), held["s"]),
    )
    fields: dict[str, Any] = {
        "activation": kind.activation,
        "backbone": trainer.get("lm_name"),
        "token_window": buffer.get("ctx_len"),
    }
    if "k" in kind.shapes:
        fields["k"] = int(tensors["k"]) if "k" in tensors else trainer.get("k")
        _agree(files, k=(trainer.get("k"), fields["k"]))
        if not isinstance(fields["k"], int):
            raise ValueError(f"{path} has k={fields['k']!r}; the number of features that a token keeps is needed.")
    if "group_sizes" in tensors:
        fields["nested_widths"] = tensors["group_sizes"].cumsum(0).tolist()
    ours = {
        "W_enc": tensors["W_enc"] if "W_enc" in tensors else tensors["encoder.weight"].T,
        "b_enc": tensors["b_enc"] if "b_enc" in tensors else tensors["encoder.bias"],
        "W_dec": tensors["W_dec"] if "W_dec" in tensors else tensors["decoder.weight"].T,
        "b_dec": next(tensors[name] for name, shape in kind.shapes.items() if shape == "d"),
    }
    if "threshold" in SAE_ACTIVATIONS[kind.activation].tensors:  # one for all features, or one each
        if tensors["threshold"].shape not in ((), (held["s"],)):
            raise ValueError(
                f"{files.name} holds threshold of shape {tuple(tensors['threshold'].shape)}; it is damaged."
            )
        ours["threshold"] = tensors["threshold"].expand(held["s"])
    return Published(ours, block if isinstance(block, int) else None, fields, kind.subtracts)


def _refuse_unknown(path, fields, known):
    unknown = {name for name in fields.keys() - known if fields[name]}
    if unknown:
        raise ValueError(
            f"{path} has fields that are not known here: "
            f"{', '.join(f'{name}={fields[name]!r}' for name in sorted(unknown))}; if they change nothing that the SAE "
            "computes, remove them from the file."
        )


LAYOUTS: dict[str, Any] = {
    "Gemma Scope 2": _gemma_scope_2,
    "sparsify": _sparsify,
    "dictionary_learning": _dictionary_learning,
    "SAELens": None,
}
"""Whose configuration -> the function that reads the layout. Qwen-Scope has no configuration."""
