"""Files that would run code: pickles in every place where one is read, and remote code in odd places."""

import io
import json
import pickle
import shutil
from collections.abc import Iterator

import numpy as np
import torch

from benchmarks.reliability import writers
from segcompass.loaders import load_rows
from segcompass.loaders.files import read_pickle
from segcompass.modeling_segcompass import SegCompassModel, SegCompassProcessor, SparseAutoencoder
from segcompass.modeling_segcompass.manifest import sign
from segcompass.modeling_segcompass.sam_weights import read_original_sam
from segcompass.trainers.image_features import ImageFeatures
from tests.support.refer import write_instances

from . import OWNED, Attack, Calls


def _opcodes(module: str, name: str, argument: str) -> bytes:
    """A pickle, written by hand, that calls a function with a text."""
    return f"c{module}\n{name}\n(V{argument}\ntR.".encode()


def attacks() -> Iterator[Attack]:
    """Yields the attacks."""
    for number, make in enumerate(
        (
            lambda folder: pickle.dumps(Calls(folder)),
            lambda folder: pickle.dumps([{"ref_id": Calls(folder)}], protocol=0),
            lambda folder: _opcodes("os", "system", f"touch {folder / OWNED}"),
            lambda folder: _opcodes("builtins", "exec", f"open({str(folder / OWNED)!r}, 'w')"),
            lambda folder: _opcodes("posix", "system", f"touch {folder / OWNED}"),
            lambda folder: _opcodes("subprocess", "getoutput", f"touch {folder / OWNED}"),
            lambda folder: _opcodes("importlib", "import_module", "antigravity"),
            lambda folder: b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",
        )
    ):

        def refer(folder, make=make):
            write_instances(folder / "refcoco")
            (folder / "refcoco" / "refs(unc).p").write_bytes(make(folder))
            load_rows("refcoco", "val", root=folder)

        def plain(folder, make=make):
            (folder / "a.p").write_bytes(make(folder))
            read_pickle(folder / "a.p")

        yield Attack(f"pickle {number} as RefCOCO's refs", refer, "plain data")
        yield Attack(f"pickle {number}", plain, "plain data")

    for name in ("rng_state.pth", "optimizer.pt", "scheduler.pt", "rollouts_0.pt"):

        def resume(folder, name=name):
            """A checkpoint that the attacker has signed."""
            writer = "grpo" if name.startswith("rollouts") else "sae"
            writers.run_quietly(writer, folder / "run")
            for each in ("checkpoint-3", "model.safetensors"):
                path = folder / "run" / each
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            checkpoint = folder / "run" / "checkpoint-2"
            torch.save(Calls(folder), checkpoint / name)
            sign(checkpoint)
            writers.run_quietly(writer, folder / "run")

        yield Attack(f"a checkpoint's {name}", resume, "(?i)weights.only|Unsupported|Unpickler")

    def weights(folder):
        """A model whose weights are a pickle."""
        writers.saved_model(folder / "model")
        (folder / "model" / "model.safetensors").unlink()
        torch.save({"a": Calls(folder)}, folder / "model" / "pytorch_model.bin")
        sign(folder / "model")
        SegCompassModel.from_pretrained(folder / "model")

    yield Attack("weights as a pickle", weights, "(?i)weights|safetensors|unpickl")

    def sam(folder):
        torch.save({"mask_decoder": Calls(folder)}, folder / "sam.pth")
        read_original_sam(str(folder / "sam.pth"))

    yield Attack("SAM's original file", sam, "(?i)weights.only|Unsupported|Unpickler")

    def features(folder):
        writers.feature_cache(folder / "cache")
        content = io.BytesIO()
        np.save(content, np.array([Calls(folder)], dtype=object), allow_pickle=True)
        (folder / "cache" / "shard-00000.npy").write_bytes(content.getvalue())
        ImageFeatures(folder / "cache", "an-encoder")

    yield Attack("an array of objects in a cache", features, "allow_pickle|Object arrays|cannot be read")

    code = "open({!r}, 'w')\nclass {}: pass\n"
    places = {
        "config.json": ("auto_map", {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}),
        "processor_config.json": ("auto_map", {"AutoProcessor": "evil.Evil"}),
        "tokenizer_config.json": ("auto_map", {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}),
        "generation_config.json": ("custom_generate", "evil"),
    }
    for file, (field, value) in places.items():
        for inner in ("", "mllm_config", "sae_config", "image_encoder_config", "image_processor"):

            def remote(folder, file=file, field=field, value=value, inner=inner):
                """Names code of its own in a configuration, and signs it."""
                model = folder / "model"
                writers.saved_model(model)
                (model / "evil.py").write_text(code.format(str(folder / OWNED), "Evil"))
                (model / "custom_generate").mkdir()
                (model / "custom_generate" / "generate.py").write_text(code.format(str(folder / OWNED), "Evil"))
                path = model / file
                fields = json.loads(path.read_text()) if path.exists() else {}
                (fields.setdefault(inner, {}) if inner else fields)[field] = value
                path.write_text(json.dumps(fields))
                sign(model)
                for load in (SegCompassModel, SegCompassProcessor):
                    try:
                        load.from_pretrained(model)
                    except Exception as error:  # refused, in whatever words
                        assert OWNED not in str(error)
                return True

            if not inner or file in ("config.json", "processor_config.json"):
                yield Attack(f"code named by {inner + '.' if inner else ''}{field} of {file}", remote)

    def beside_sae(folder):
        writers.converted_sae(folder / "saes")
        sae = folder / "saes" / "ours"
        fields = json.loads((sae / "config.json").read_text()) | {"auto_map": {"AutoModel": "evil.Evil"}}
        (sae / "config.json").write_text(json.dumps(fields))
        (sae / "evil.py").write_text(code.format(str(folder / OWNED), "Evil"))
        sign(sae)
        SparseAutoencoder.from_pretrained(sae)
        return True

    yield Attack("code named by an autoencoder's configuration", beside_sae)

    def script(folder):
        (folder / "data").mkdir()
        (folder / "data" / "data.py").write_text(code.format(str(folder / OWNED), "Evil"))
        load_rows(str(folder / "data"), "train")

    yield Attack("a loading script in a data set's folder", script, "holds neither")
