"""Paths and addresses that lead where they must not: out of a folder, to this machine, to a local network."""

import http.server
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import datasets
from PIL import Image

from benchmarks.reliability import writers
from segcompass.loaders import load_rows
from segcompass.loaders.rows import row_image
from segcompass.modeling_segcompass import SegCompassModel
from segcompass.modeling_segcompass.images import read_image
from segcompass.modeling_segcompass.manifest import MANIFEST, check
from segcompass.modeling_segcompass.web_images import fetch
from segcompass.preparation import fetch as fetch_document_image
from tests.support.refer import ref, write_images, write_instances

from . import Attack

OUTSIDE = "outside {}|lies outside"


def _secret(folder: Path) -> Path:
    """An image that lies beside the data set's folder, where it must not be read."""
    path = folder / "secret.png"
    Image.new("RGB", (28, 28)).save(path)
    (folder / "data").mkdir(exist_ok=True)
    Image.new("RGB", (28, 28)).save(folder / "data" / "mine.png")
    return path


def attacks() -> Iterator[Attack]:
    """Yields the attacks."""
    ways = {
        "upwards": lambda secret: "../secret.png",
        "upwards and around": lambda secret: "a/../../secret.png",
        "absolute": lambda secret: str(secret),
        "upwards far": lambda secret: "../" * 40 + str(secret).lstrip("/"),
        "with dots": lambda secret: "./.././secret.png",
    }
    for name, way in ways.items():
        for key in ("image", "mask", "ignore"):

            def line(folder, way=way, key=key):
                given = {"image": "mine.png", "instruction": "it", "polygons": [[2, 2, 9, 2, 9, 9]]}
                given[key] = way(_secret(folder))
                if key == "mask":
                    del given["polygons"]
                (folder / "data" / "a.jsonl").write_text(json.dumps(given) + "\n")
                load_rows(str(folder / "data" / "a.jsonl"), "train")

            yield Attack(f"a JSONL's {key}, {name}", line, "lies outside")

        def refer(folder, way=way):
            write_instances(folder / "data" / "refcoco")
            write_images(folder / "data" / "images")
            path = folder / "data" / "refcoco" / "instances.json"
            content = json.loads(path.read_text())
            for image in content["images"]:
                image["file_name"] = way(_secret(folder / "data"))
            path.write_text(json.dumps(content))
            import pickle

            (folder / "data" / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps([ref(1, 10, ["it"])]))
            load_rows("refcoco", "val", root=folder / "data", image_dir=folder / "data" / "images")

        yield Attack(f"RefCOCO's image, {name}", refer, "lies outside")

        def parquet(folder, way=way):
            _secret(folder)
            annotation = {"segmentation": [[2, 2, 9, 2, 9, 9]]}
            row = {
                "raw_anns": json.dumps(annotation),
                "raw_image_info": json.dumps({"file_name": way(folder / "secret.png"), "height": 28, "width": 28}),
                "sentences": [{"sent_id": 1, "sent": "it"}],
                "ref_id": 1,
                "image_id": 1,
            }
            datasets.Dataset.from_list([row]).to_parquet(folder / "test-00000-of-00001.parquet")
            from segcompass.loaders import load_parquet

            load_parquet(folder / "test-00000-of-00001.parquet", "test", image_dir=folder / "data")

        yield Attack(f"a parquet file's image, {name}", parquet, "lies outside")

    def manifest(name):
        def run(folder):
            writers.saved_model(folder / "model")
            text = (folder / "model" / MANIFEST).read_text()
            path = folder / "model" / MANIFEST
            content = json.loads(text)
            from segcompass.modeling_segcompass import manifest as module

            files = {name: {"size": 1, "sha256": "0" * 64}} | content["files"]
            path.write_text(module._text(files))
            check(folder / "model")

        return run

    for name in ("../../etc/passwd", "/etc/passwd", "a/../../b"):
        yield Attack(f"a manifest that lists {name}", manifest(name), "outside its folder")

    def index(folder):
        writers.saved_model(folder / "model")
        (folder / "model" / "model.safetensors").rename(folder / "stolen.safetensors")
        names = {"weight_map": {"a": "../stolen.safetensors"}, "metadata": {"total_size": 1}}
        (folder / "model" / "model.safetensors.index.json").write_text(json.dumps(names))
        (folder / "model" / MANIFEST).unlink()
        SegCompassModel.from_pretrained(folder / "model")

    yield Attack("an index of weights that leads out of its folder", index, "no file of its folder")

    local = (
        *("http://127.0.0.1:{port}/a", "http://localhost:{port}/a", "http://0.0.0.0:{port}/a", "http://[::1]:{port}/a"),
        *(
            "http://127.1:{port}/a",
            "http://2130706433:{port}/a",
            "http://0x7f000001:{port}/a",
            "http://0177.0.0.1:{port}/a",
        ),
        *("http://localhost.:{port}/a", "http://LOCALHOST:{port}/a", "http://a@127.0.0.1:{port}/a"),
        *(
            "http://127.0.0.1:{port}@localhost:{port}/a",
            "http://[::ffff:127.0.0.1]:{port}/a",
            "http://127.255.255.254:{port}/a",
        ),
        *("http://169.254.169.254/latest", "http://10.0.0.1/a", "http://192.168.1.1/a", "http://172.16.0.1/a"),
        *("http://[fe80::1]/a", "http://[fc00::1]/a", "http://224.0.0.1/a", "https://127.0.0.1:{port}/a"),
    )
    for address in local:
        yield Attack(
            f"an image at {address}", _asks(address), "local network|no address|not known|does not appear|resol"
        )
    for address in ("file:///etc/hostname", "FILE:///etc/hostname", "ftp://127.0.0.1/a", "gopher://127.0.0.1/a"):
        yield Attack(f"fetching {address}", lambda folder, address=address: fetch(address), "not http or https")
        yield Attack(
            f"an OBELICS image at {address}",
            lambda folder, address=address: (
                fetch_document_image(address, folder) is False and not list(folder.iterdir())
            ),
        )
        yield Attack(
            f"an image named {address}", lambda folder, address=address: read_image(address), "read|http|missing|file"
        )
    for path in ("zip://a.png::http://127.0.0.1:{port}/a.zip", "zip://a.png::file:///etc/hostname"):

        def archive(folder, path=path):
            with _Site() as site:
                row = {"image": {"path": path.format(port=site.port), "bytes": None}, "sample_id": "a"}
                try:
                    row_image(row)
                finally:
                    assert not site.asked, "a row's image was fetched from this machine"

        yield Attack(f"a row's image at {path}", archive, "within an archive at an address")


class _Site:
    """A server on this machine that notes whether it was asked."""

    def __enter__(self):
        self.asked = asked = []

        class Answer(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                asked.append(self.path)
                self.send_error(404)

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *args):
        self.server.shutdown()
        self.server.server_close()


def _asks(address):
    def run(folder):
        for name in ("http_proxy", "https_proxy", "all_proxy"):
            os.environ.pop(name, None)
            os.environ.pop(name.upper(), None)
        os.environ.pop("SEGCOMPASS_LOCAL_URLS", None)
        with _Site() as site:
            try:
                read_image(address.format(port=site.port))
            finally:
                assert not site.asked, "this machine was asked"

    return run
