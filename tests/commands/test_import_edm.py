"""`uni3d import-edm`: networks arrive bit for bit, and nothing that a file holds is ever run."""

from __future__ import annotations

import builtins
import collections
import contextlib
import copy
import dataclasses
import functools
import hashlib
import importlib
import json
import operator
import os
import pickle
import struct
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edm_pickles import Call, Persistent, dumps, persistent, snapshot, storage_bytes, tensor_call
from torch import nn

from uni3d import cli
from uni3d.diffusion import edm, edm_import
from uni3d.diffusion.edm import EDMDenoiser, preset
from uni3d.diffusion.edm_import import import_edm
from uni3d.errors import ConfigError, MissingWeightsError, UsageError

TINY = {"resolution": 8, "num_blocks": 1, "attention_resolutions": (4,)}
CONFIGS = {
    "ddpm++": dataclasses.replace(
        preset("cifar10-32x32-cond-vp"), model_channels=8, channel_mult=(1, 2), **TINY
    ),
    "ncsn++": dataclasses.replace(
        preset("cifar10-32x32-uncond-ve"), model_channels=8, channel_mult=(1, 2), **TINY
    ),
    "adm": dataclasses.replace(
        preset("imagenet-64x64-cond-adm"), model_channels=64, channel_mult=(1, 1), label_dim=5, **TINY
    ),
}


def network(name: str = "ddpm++") -> EDMDenoiser:
    return EDMDenoiser(CONFIGS[name], generator=torch.Generator().manual_seed(0))


def write(tmp_path: Path, data: bytes) -> Path:
    file = tmp_path / "network.pkl"
    file.write_bytes(data)
    return file


def refused(tmp_path: Path, data: bytes) -> str:
    """Import `data`, expect one sentence, no output and nothing left behind; return the sentence."""
    file = write(tmp_path, data)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(UsageError) as caught:
        import_edm(file, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == before
    message = str(caught.value)
    assert caught.value.exit_code == 2 and "\n" not in message and len(message) < 700
    assert message.startswith(f"'{file}' ") and ("; " in message or ", so " in message)
    return message


# ---- what is imported


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_a_snapshot_arrives_bit_for_bit(name: str, protocol: int, tmp_path: Path) -> None:
    net = network(name)
    data = snapshot(net, protocol=protocol)
    result = import_edm(write(tmp_path, data), tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "model.safetensors"]
    assert sorted(os.listdir(tmp_path)) == ["network.pkl", "out"]
    loaded = edm.load(result.directory)
    expected = net.state_dict()
    assert loaded.config == net.config and not loaded.training
    assert set(loaded.state_dict()) == set(expected) and result.num_tensors == len(expected)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded.state_dict().items())
    assert all(tensor.dtype == torch.float32 for tensor in loaded.state_dict().values())
    assert result.num_parameters == sum(parameter.numel() for parameter in net.parameters())
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(loaded(x, 0.7), net.eval()(x, 0.7), rtol=0, atol=0)
    config, source = edm.read_description(result.directory)
    assert config == net.config
    assert source["file"] == "network.pkl" and source["sha256"] == hashlib.sha256(data).hexdigest()
    assert source["class_name"] == "EDMPrecond"
    assert source["arguments"]["channel_mult"] == list(net.config.channel_mult)
    assert not {"torch_utils", "dnnlib"} & set(sys.modules)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cifar10-32x32-uncond-vp", "cifar10-32x32-uncond-ve"])
def test_a_network_of_full_size_arrives(name: str, tmp_path: Path) -> None:
    net = EDMDenoiser(preset(name), generator=torch.Generator().manual_seed(0))
    result = import_edm(write(tmp_path, snapshot(net)), tmp_path / "out")
    assert result.num_tensors in (425, 432) and result.config == preset(name)
    loaded, expected = edm.load(tmp_path / "out").state_dict(), net.state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded.items())


def test_generators_of_sida_and_uni_instruct_arrive(tmp_path: Path) -> None:
    net = network()
    generator = persistent(net, "EDMPrecond_EncoderDecoder")
    generator.state["_init_kwargs"] |= {"model_type": "SongUNet_EncoderDecoder", "sigma_max": float("inf")}
    file = write(tmp_path, dumps({"ema": generator}))
    result = import_edm(file, tmp_path / "out")
    assert (result.class_name, result.model_type) == ("EDMPrecond_EncoderDecoder", "SongUNet_EncoderDecoder")
    assert edm.read_description(tmp_path / "out")[1]["arguments"]["sigma_max"] == "inf"
    del generator.state["_init_kwargs"]["model_type"]  # is this class's default
    write(tmp_path, dumps(generator))  # the object itself, in no dict
    again = import_edm(file, tmp_path / "again")
    assert again.model_type == "SongUNet_EncoderDecoder"
    loaded, expected = edm.load(tmp_path / "again").state_dict(), net.state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded.items())


def test_arguments_given_by_position_and_as_numpy_numbers_count(tmp_path: Path) -> None:
    net = network()

    def change(content: dict[str, Any]) -> None:
        state = content["ema"].state
        named = state["_init_kwargs"]
        state["_init_args"] = (named.pop("img_resolution"), named.pop("img_channels"))
        named["label_dim"] = np.int64(10)
        named["dropout"] = np.float32(0.125)

    result = import_edm(write(tmp_path, snapshot(net, change=change)), tmp_path / "out")
    assert result.config == dataclasses.replace(net.config, dropout=0.125)


def test_lower_precision_widens_exactly(tmp_path: Path) -> None:
    net = network()
    expected = {key: tensor.half().float() for key, tensor in net.state_dict().items()}
    import_edm(write(tmp_path, snapshot(net.half())), tmp_path / "out")
    loaded = edm.load(tmp_path / "out").state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded.items())


def test_tensors_may_be_transposed_or_share_a_storage(tmp_path: Path) -> None:
    net = network()
    generator = torch.Generator().manual_seed(3)
    turned = torch.randn(3, 3, 3, 8, generator=generator).permute(3, 2, 0, 1)
    shared = torch.randn(100, generator=generator)
    net.model.enc["8x8_conv"].weight = nn.Parameter(turned)  # type: ignore[assignment]
    norm = net.model.enc["8x8_block0"].norm0
    norm.weight, norm.bias = nn.Parameter(shared[10:18]), nn.Parameter(shared[50:58])  # type: ignore[assignment]
    import_edm(write(tmp_path, snapshot(net)), tmp_path / "out")
    loaded = edm.load(tmp_path / "out").state_dict()
    assert torch.equal(loaded["model.enc.8x8_conv.weight"], turned)
    assert torch.equal(loaded["model.enc.8x8_block0.norm0.weight"], shared[10:18])
    assert torch.equal(loaded["model.enc.8x8_block0.norm0.bias"], shared[50:58])


# ---- the command and its output


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, snapshot(network()))
    out = tmp_path / "new" / "out"
    assert cli.main(["import-edm", str(file), "--output", str(out)]) == 0
    shown, said = capsys.readouterr()
    assert shown == f"{out}\n" and "EDMPrecond around SongUNet (ddpm++)" in said and "licence" in said
    assert cli.main(["import-edm", str(file), "--output", str(out)]) == 2
    assert "exists; choose another name or pass --overwrite" in capsys.readouterr().err
    assert cli.main(["import-edm", str(file), "--output", str(out), "--overwrite", "--json", "--quiet"]) == 0
    shown, said = capsys.readouterr()
    assert json.loads(shown)["network"]["body"] == "ddpm++" and said == ""
    assert cli.main(["import-edm", str(tmp_path / "none.pkl"), "--output", str(out)]) == 2
    assert "does not exist or is not a file; pass a .pkl" in capsys.readouterr().err
    assert cli.main(["import-edm", str(file), "--output", str(file)]) == 2
    assert "is a file where a folder is needed" in capsys.readouterr().err


def test_help_needs_no_torch() -> None:
    probe = (
        "import sys\nfrom uni3d.cli import main\ncode = main(['import-edm', '--help'])\n"
        "assert 'torch' not in sys.modules and code == 0\n"
        "import uni3d.diffusion.edm_config\nassert 'torch' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "--overwrite" in result.stdout


def test_what_exists_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = import_edm(write(tmp_path, snapshot(network())), tmp_path / "out")
    before = {path.name: path.read_bytes() for path in first.directory.iterdir()}
    file = write(tmp_path, snapshot(network("ncsn++")))

    def untouched() -> bool:
        now = {path.name: path.read_bytes() for path in first.directory.iterdir()}
        return now == before and sorted(os.listdir(tmp_path)) == ["network.pkl", "out"]

    with pytest.raises(UsageError, match="exists; choose another name or pass --overwrite"):
        import_edm(file, tmp_path / "out")
    assert untouched()
    write(tmp_path, b"\x80\x04N.")
    with pytest.raises(UsageError, match="cannot be imported"):
        import_edm(file, tmp_path / "out", overwrite=True)
    assert untouched()
    write(tmp_path, snapshot(network("ncsn++")))
    real = os.rename

    def fails(source: Any, target: Any) -> None:
        if str(source).endswith(".new"):
            raise OSError(28, "No space left on device", str(target))
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(edm.os, "rename", fails)
        with pytest.raises(OSError, match="No space left"):
            import_edm(file, tmp_path / "out", overwrite=True)
    assert untouched()
    with monkeypatch.context() as patch:
        patch.setattr(edm, "atomic_write_json", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            import_edm(file, tmp_path / "out", overwrite=True)
    assert untouched()
    import_edm(file, tmp_path / "out", overwrite=True)
    assert edm.load(tmp_path / "out").config.body == "ncsn++"
    assert sorted(os.listdir(tmp_path)) == ["network.pkl", "out"]
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"holds other files, such as 'notes.txt'; choose a new folder"):
        import_edm(file, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_save_and_load(tmp_path: Path) -> None:
    net = network("adm")
    folder = edm.save(net, tmp_path / "net", source={"made": "here"})
    assert edm.read_description(folder) == (net.config, {"made": "here"})
    loaded = edm.load(folder, body_dtype=torch.bfloat16)
    assert loaded.body_dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), loaded.parameters(), strict=True))
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    copied = copy.deepcopy(loaded)
    copied.model.map_layer0.bias.data += 1  # type: ignore[operator]
    assert torch.equal(
        loaded.state_dict()["model.map_layer0.bias"], net.state_dict()["model.map_layer0.bias"]
    )
    edm.save(loaded, folder, overwrite=True)
    with pytest.raises(MissingWeightsError, match=r"holds no config.json; pass a folder"):
        edm.load(tmp_path / "none")
    description = json.loads((folder / "config.json").read_text())
    for content, message in [
        ("{", "is damaged"),
        ("[" * 200_000, "is damaged"),
        ("[]", "does not describe an EDM network of format uni3d-edm-1"),
        (json.dumps(description | {"network": 3}), "lacks its 'network' or 'source'"),
        (
            json.dumps(description | {"network": description["network"] | {"num_blocks": 99}}),
            "num_blocks is 99",
        ),
    ]:
        (folder / "config.json").write_text(content)
        with pytest.raises(ConfigError, match=message):
            edm.load(folder)
    description["network"]["num_blocks"] = 2
    (folder / "config.json").write_text(json.dumps(description))
    with pytest.raises(UsageError, match=r"does not fit its config.json: it lacks model.dec.*; import"):
        edm.load(folder)
    (folder / "model.safetensors").write_bytes(b"\x80\x04N.")
    with pytest.raises(UsageError, match="looks like a pickle"):
        edm.load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(MissingWeightsError, match=r"model.safetensors' does not exist"):
        edm.load(folder)


# ---- files that are something else, or networks of another kind


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty; download it again"),
        (b"hello world", "is no pickle; pass a .pkl of EDM"),
        (b"PK\x03\x04" + bytes(50), "is a zip archive, as torch.save writes; pass the .pkl"),
        (b"\x1f\x8b" + bytes(50), "is compressed; unpack it first"),
        (b"<!DOCTYPE html><html></html>", "is a web page, so the download failed"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is the pointer of a Git LFS file; fetch"),
        (struct.pack("<Q", 2) + b"{}", "looks like safetensors; only pickles need importing, so load it"),
        (b"\x80\x00.", "claims the pickle protocol 0"),
        (b"\x80\x09.", "claims the pickle protocol 9"),
        (b"\x80", "is damaged: it ends in the middle of a value; download it again"),
        (b"\x80\x04N.", "it holds a value of the kind 'NoneType' in the place of a network; pass"),
        (b"\x80\x04}.", "it holds nothing but no 'ema'; pass a network snapshot"),
        (b"\x80\x04}X\x01\x00\x00\x00aNs.", "it holds a but no 'ema'"),
    ],
)
def test_other_files_are_told_apart(data: bytes, message: str, tmp_path: Path) -> None:
    assert message in refused(tmp_path, data)


def test_the_size_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "network.pkl"
    with file.open("wb") as stream:
        stream.truncate(5 * 2**30)  # sparse
    with pytest.raises(UsageError, match=r"has 5.0 GiB; networks of this kind have at most 4, so check"):
        import_edm(file, tmp_path / "out")
    with pytest.raises(UsageError, match="is not a file; pass"):
        import_edm(Path("/dev/zero"), tmp_path / "out")
    with pytest.raises(UsageError, match="is not a file; pass"):
        import_edm(tmp_path, tmp_path / "out")


@pytest.mark.parametrize(
    ("wrapper", "message"),
    [
        ("VPPrecond", "it holds a VPPrecond, which is VP preconditioning; pass a network with EDM"),
        ("VEPrecond", "which is VE preconditioning"),
        ("iDDPMPrecond", "which is iDDPM preconditioning"),
        ("Precond", "which is the EDM2 network"),
        ("StyleGAN", "it holds a 'StyleGAN'; expected one of EDMPrecond, EDMPrecond_EncoderDecoder"),
    ],
)
def test_other_wrappers_are_named(wrapper: str, message: str, tmp_path: Path) -> None:
    assert message in refused(tmp_path, snapshot(network(), wrapper=wrapper))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model_type": "UNet"}, "its body is 'UNet'; pass a network with one of SongUNet,"),
        ({"model_type": ["SongUNet"]}, "its body is a value of the kind 'list'"),
        ({"encoder_type": "skip"}, "its SongUNet is neither DDPM++ nor NCSN++"),
        ({"resample_filter": "box"}, "its resample_filter is 'box'; expected"),
        ({"depth": 4}, "'depth' is no argument of EDMPrecond and SongUNet"),
        ({"num_blocks": 10**9}, "num_blocks is 1000000000; expected a whole number from 1 to 16"),
        ({"channel_mult": [2] * 10**5}, "channel_mult is "),
        ({"img_resolution": True}, "resolution is True"),
        ({"dropout": float("nan")}, "dropout is nan"),
        ({"sigma_max": {"a": 1}}, "its constructor argument sigma_max is a value of the kind 'dict'"),
        ({"num_blocks": 2}, "its tensors do not fit its constructor arguments: it lacks model.dec."),
        ({"label_dim": 11}, "model.map_label.weight has the shape [8, 10] where [8, 11] is expected"),
        ({"augment_dim": 0}, "it has the unexpected model.map_augment.weight"),
        ({"channel_mult": [1, 1]}, "it has the unexpected model.enc.4x4_block0.skip.bias"),
        (
            {
                "embedding_type": "fourier",
                "encoder_type": "residual",
                "resample_filter": [1, 3, 3, 1],
                "channel_mult_noise": 2,
            },
            "it lacks model.enc.4x4_aux_residual.bias",
        ),
    ],
)
def test_constructor_arguments_are_checked(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["ema"].state["_init_kwargs"] |= arguments

    assert message in refused(tmp_path, snapshot(network(), change=change))


def test_incomplete_records_are_refused(tmp_path: Path) -> None:
    def without(*path: str) -> Callable[[dict[str, Any]], None]:
        def change(content: dict[str, Any]) -> None:
            target = content["ema"].state
            for name in path[:-1]:
                target = target[name].state if isinstance(target[name], Persistent) else target[name]
            del target[path[-1]]

        return change

    for path, message in [
        (("_init_kwargs",), "was stored without its constructor arguments; pass"),
        (("_init_kwargs", "img_resolution"), "was made without img_resolution; pass"),
        (("_modules", "model"), "it lacks model.dec"),
        (("_modules", "model", "_modules", "map_layer0"), "it lacks model.map_layer0.bias, model.map_lay"),
    ]:
        assert message in refused(tmp_path, snapshot(network(), change=without(*path)))


def test_wrong_values_are_refused(tmp_path: Path) -> None:
    net = network()
    net.model.map_layer0.bias.data[3] = float("nan")
    assert "model.map_layer0.bias holds numbers that are not finite" in refused(tmp_path, snapshot(net))
    net = network()
    net.model.map_layer0.bias.data = net.model.map_layer0.bias.data.double()
    assert "holds torch.float64; expected torch.float32" in refused(tmp_path, snapshot(net))
    net = network()
    net.model.enc["4x4_down"].conv0.resample_filter[0, 0, 0, 0] = 0.5  # type: ignore[index]
    assert "is not the filter that its constructor" in refused(tmp_path, snapshot(net))


# ---- damaged files


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    data = snapshot(network("ncsn++"))
    ends = [*range(0, 400, 7), *range(400, len(data), len(data) // 60), len(data) - 1]
    for end in ends:
        with pytest.raises(UsageError):
            import_edm(write(tmp_path, data[:end]), tmp_path / "out")
    assert os.listdir(tmp_path) == ["network.pkl"]


def test_flipped_bytes_never_escape(tmp_path: Path) -> None:
    """Whatever the damage, the result is a network or one sentence; nothing else comes out."""
    data = snapshot(network())
    generator = np.random.default_rng(0)
    for _ in range(80):
        damaged = bytearray(data)
        for position in generator.integers(0, len(data), size=3):
            damaged[position] = generator.integers(0, 256)
        damaged[int(generator.integers(2, 600))] = int(generator.integers(0, 256))
        try:
            import_edm(write(tmp_path, bytes(damaged)), tmp_path / "out", overwrite=True)
        except UsageError as error:
            assert "\n" not in str(error)


# ---- hostile files


@pytest.fixture
def sentinel(tmp_path: Path) -> Path:
    """A file that the hostile objects below would make if they ran."""
    file = tmp_path / "outside" / "ran"
    file.parent.mkdir()
    return file


def with_object(value: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        content["dataset_kwargs"] = value

    return change


def hostile_calls(file: str) -> dict[str, tuple[Any, str]]:
    """Name -> (an object whose unpickling would write `file` or misuse a name, what is said)."""
    write_it = f"open({file!r}, 'w').write('ran')"
    weight = torch.arange(6.0)
    storage = weight.untyped_storage()
    typed = weight._typed_storage()
    return {
        "os.system": (Call(os.system, f"touch {file}"), "it names '"),
        "eval": (Call(builtins.eval, write_it), "it names 'builtins.eval'"),
        "exec": (Call(builtins.exec, write_it), "it names 'builtins.exec'"),
        "getattr": (Call(getattr, "os", "system"), "it names 'builtins.getattr'"),
        "import": (Call(importlib.import_module, "os"), "it names 'importlib.import_module'"),
        "methodcaller": (Call(operator.methodcaller, "system"), "it names 'operator.methodcaller'"),
        "partial": (Call(functools.partial, print), "it names 'functools.partial'"),
        "open": (Call(open, file, "w"), "it names '"),
        "bytearray": (Call(bytearray, 2**40), "it names 'builtins.bytearray'"),
        "torch.load": (Call(torch.load, file), "it names 'torch.serialization.load'"),
        "numpy arrays": (np.zeros(3), "'"),
        "numpy objects": (np.array([Call(os.system, f"touch {file}")], dtype=object), "it names 'numpy"),
        "numpy records": (np.zeros(1, dtype=[("a", "f4")])[0], "it has a numpy type other than"),
        "numpy dtype": (Call(np.dtype, "O", False, True), "it has a numpy type other than a plain"),
        "other modules": (nn.Linear(2, 2), "it names 'torch.nn.modules.linear.Linear'"),
        "module class": (nn.ModuleDict, "in the place"),
        "ordered": (Call(OrderedDict, [("a", 1)]), "it calls 'collections.OrderedDict' with arguments"),
        "instance": (Call(collections.OrderedDict, state={"__class__": 1}), "it sets the state of"),
        "set": (Call(set, [(1, 2)]), "it calls 'builtins.set' with something other than a list"),
        "tensor arity": (tensor_call(typed, 0, (6,)), "it has a tensor of 3 arguments"),
        "tensor storage": (tensor_call(os.curdir, 0, (6,), (1,), False, OrderedDict()), "without a storage"),
        "tensor hooks": (
            tensor_call(typed, 0, (6,), (1,), False, OrderedDict(a=1)),
            "it has a tensor with hooks",
        ),
        "metadata": (
            tensor_call(typed, 0, (6,), (1,), False, OrderedDict(), {"a": 1}),
            "it has a tensor with hooks, with metadata",
        ),
        "too long": (
            tensor_call(typed, 0, (7,), (1,), False, OrderedDict()),
            "reaches beyond the end of its storage",
        ),
        "too wide": (
            tensor_call(typed, 0, (2,), (6,), False, OrderedDict()),
            "reaches beyond the end of its storage",
        ),
        "offset": (
            tensor_call(typed, 6, (1,), (1,), False, OrderedDict()),
            "reaches beyond the end of its storage",
        ),
        "negative": (
            tensor_call(typed, -1, (1,), (1,), False, OrderedDict()),
            "are not whole numbers",
        ),
        "negative stride": (
            tensor_call(typed, 5, (6,), (-1,), False, OrderedDict()),
            "are not whole numbers",
        ),
        "stride zero": (
            tensor_call(typed, 0, (2**40,), (0,), False, OrderedDict()),
            "it has a tensor that repeats or leaves out numbers",
        ),
        "gaps": (
            tensor_call(typed, 0, (3,), (2,), False, OrderedDict()),
            "it has a tensor that repeats or leaves out numbers",
        ),
        "huge": (
            tensor_call(typed, 0, (2**61, 2**61), (2**61, 1), False, OrderedDict()),
            "reaches beyond the end of its storage",
        ),
        "no integers": (
            tensor_call(typed, 0, ("6",), (1,), False, OrderedDict()),
            "are not whole numbers",
        ),
        "ranks": (tensor_call(typed, 0, (6,), (1, 1), False, OrderedDict()), "do not belong together"),
        "axes": (tensor_call(typed, 0, (1,) * 99, (1,) * 99, False, OrderedDict()), "do not belong"),
        "untyped": (tensor_call(storage, 0, (6,), (1,), False, OrderedDict()), "it names 'torch.storage.U"),
        "parameter": (
            Call(torch._utils._rebuild_parameter, "weight", True, OrderedDict()),
            "it has a parameter that is not a tensor",
        ),
        "load text": (Call(torch.storage._load_from_bytes, "text"), "it has a storage that is not bytes"),
        "load code": (
            Call(torch.storage._load_from_bytes, pickle.dumps(Call(os.system, f"touch {file}"), protocol=2)),
            "it names '",
        ),
        "load code late": (
            Call(
                torch.storage._load_from_bytes,
                storage_bytes(typed).replace(b"ctorch\nFloatStorage\n", b"cposix\nsystem\n"),
            ),
            "it names 'posix.system'",
        ),
        "load zip": (Call(torch.storage._load_from_bytes, b"PK\x03\x04" + bytes(99)), "zip format"),
        "load nothing": (Call(torch.storage._load_from_bytes, b""), "it ends in the middle"),
        "load many": (
            Call(torch.storage._load_from_bytes, b"\x80\x02" + b"N0" * 1000 + b"N."),
            "more operations than any",
        ),
        "load magic": (
            Call(torch.storage._load_from_bytes, storage_bytes(typed).replace(b"\x6c\xfc", b"\x6d\xfc", 1)),
            "it has a storage that torch did not write",
        ),
        "load claim": (
            Call(torch.storage._load_from_bytes, storage_bytes(typed).replace(b"K\x06", b"K\x07", 1)),
            "whose size is not the one that it claims",
        ),
        "load huge claim": (
            Call(
                torch.storage._load_from_bytes,
                storage_bytes(typed).replace(b"K\x06", b"\x8a\x08" + struct.pack("<q", 2**60), 1),
            ),
            "whose size is not the one that it claims",
        ),
        "load negative claim": (
            Call(
                torch.storage._load_from_bytes, storage_bytes(typed).replace(b"K\x06", b"J\xff\xff\xff\xff")
            ),
            "it has a storage without a type, a key or a size",
        ),
        "load big endian": (
            Call(
                torch.storage._load_from_bytes,
                storage_bytes(typed).replace(b"little_endianq\x02\x88", b"little_endianq\x02\x89"),
            ),
            "it was written on a big-endian machine",
        ),
    }


@pytest.mark.parametrize("name", list(hostile_calls("ran")))
def test_hostile_objects_are_refused_and_run_nothing(name: str, tmp_path: Path, sentinel: Path) -> None:
    protocol = 3 + len(name) % 2  # names are written in two ways
    evil, message = hostile_calls(str(sentinel))[name]
    if name == "module class":
        data = dumps({"ema": evil}, protocol)
        assert message in refused(tmp_path, data)
    else:
        assert message in refused(tmp_path, snapshot(network(), protocol=protocol, change=with_object(evil)))
    assert not sentinel.exists()


@pytest.mark.parametrize("name", ["os.system", "eval", "load code"])
def test_the_hostile_objects_are_not_duds(name: str, sentinel: Path) -> None:
    """Python's own unpickler runs them."""
    data = dumps(hostile_calls(str(sentinel))[name][0])
    with contextlib.suppress(Exception):
        pickle.loads(data)
    assert sentinel.exists()


def test_the_refusal_names_the_name(tmp_path: Path, sentinel: Path) -> None:
    data = b"\x80\x04cposix\nsystem\n\x8c\x04true\x85R."
    message = refused(tmp_path, data)
    assert "was refused, and nothing in it was run: it names 'posix.system', which is not among" in message
    assert "take the file from its publisher" in message


def test_source_text_is_not_read(tmp_path: Path, sentinel: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        ema = content["ema"]
        real = ema.__reduce__()
        real[1][0]["module_src"] = f"open({str(sentinel)!r}, 'w').write('ran')"
        content["ema"] = Call(real[0], *real[1])

    import_edm(write(tmp_path, snapshot(network(), change=change)), tmp_path / "out")
    assert not sentinel.exists()


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"type": "function"}, "it has a persistent object that is not of a class"),
        ({"class_name": "os.system"}, "without a class name or a state"),
        ({"class_name": 3}, "without a class name or a state"),
        ({"class_name": "A" * 10**6}, "without a class name or a state"),
        ({"state": [1]}, "without a class name or a state"),
    ],
)
def test_persistent_objects_are_checked(meta: dict[str, Any], message: str, tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        function, arguments, *_ = content["ema"].__reduce__()
        content["ema"] = Call(function, arguments[0] | meta)

    assert message in refused(tmp_path, snapshot(network(), change=change))


@pytest.mark.parametrize(
    ("name", "member", "message"),
    [
        ("_parameters", {"a.b": torch.zeros(1)}, "has a member without a proper name"),
        ("_parameters", {3: torch.zeros(1)}, "has a member without a proper name"),
        ("_parameters", {"weight": "text"}, "'weight' is a value of the kind 'str'; expected a tensor"),
        ("_parameters", {str(i): None for i in range(2000)}, "not a dict of at most 1000"),
        ("_parameters", "text", "not a dict of at most 1000"),
        ("_modules", {"model": "text"}, "it has a value of the kind 'str' in the place of a module"),
    ],
)
def test_members_are_checked(name: str, member: Any, message: str, tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["ema"].state[name] = member

    assert message in refused(tmp_path, snapshot(network(), change=change))


def test_trees_that_fold_back_are_refused(tmp_path: Path) -> None:
    """One object in many places costs a file nothing; following every path to it would never end."""

    def loop(content: dict[str, Any]) -> None:
        content["ema"].state["_modules"]["model"] = content["ema"].state["_modules"]["again"] = nested

    nested: Any = Persistent("SongUNet", {"_modules": {}})
    for _ in range(14):
        nested = Persistent("SongUNet", {"_modules": {f"m{index}": nested for index in range(50)}})
    assert "its modules are more, or nested deeper" in refused(tmp_path, snapshot(network(), change=loop))
    for _ in range(14):
        nested = Persistent("SongUNet", {"_modules": {"m": nested}})
    assert "its modules are more, or nested deeper" in refused(tmp_path, snapshot(network(), change=loop))


def test_overlapping_tensors_are_refused(tmp_path: Path) -> None:
    """All 4D weights of one small storage: each fits it, together they would not."""
    net = network()
    data = snapshot(net)
    shared = torch.zeros(10**4)

    def change(content: dict[str, Any]) -> None:
        holder: dict[str, Any] = {}

        class Shared:
            def __reduce__(self) -> tuple[Any, ...]:
                return torch.storage._load_from_bytes, (holder["bytes"],)

        holder["bytes"] = storage_bytes(shared._typed_storage())
        one = Shared()

        def replace(module: Any) -> None:
            state = module.state if isinstance(module, Persistent) else vars(module)
            for name, value in state["_parameters"].items():
                if value is not None:
                    rebuilt = tensor_call(one, 0, tuple(value.shape), value.stride(), False, OrderedDict())
                    state["_parameters"][name] = rebuilt
            for child in state["_modules"].values():
                replace(child)

        replace(content["ema"])

    assert len(snapshot(net, change=change)) < len(data)
    assert "its tensors overlap" in refused(tmp_path, snapshot(net, change=change))


BOMBS = [
    b"\x8e" + struct.pack("<Q", 2**62),  # bytes of 4 EiB
    b"B" + struct.pack("<I", 2**32 - 1),
    b"\x8d" + struct.pack("<Q", 2**40),
    b"X" + struct.pack("<I", 2**32 - 1),
    b"\x95" + struct.pack("<Q", 2**63) + b"N.",
    b"Nr" + struct.pack("<I", 2**32 - 1) + b"0" + b"N" * 100,  # a memo of four thousand million places
    b"(" * 4 * 10**5,
    b"]q\x00" + b"h\x00a" * 4 * 10**5,  # a list that contains itself
    b"(" * 10**5 + b"N" + b"t" * 10**5 + b"\x85" * 10**5 + b".",
    b"]" * 4 * 10**5 + b"a" * (4 * 10**5 - 1) + b".",
    b"}" + b"}" * 10**5 + b"s",
    b"N" + b"\x85" * 4 * 10**5 + b"q\x00" + b"}h\x00Ns.",
    b"(" * 3 + b"N" + b"\x85q\x00h\x00\x86" * 10**5 + b".",
    b"N0" * 10**6,
    b"\x97.",
    b"2.",
    b"\x82\x01.",
    b"I5\n.",
    b"\x8b\xff\xff\xff\x7f",
    b"(cos\nsystem\no.",
    b"(S'true'\nios\nsystem\n.",
    b"c" + b"a" * 4 * 10**5,
    b"\x93.",
    b"R.",
    b"b.",
    b"NNb.",
    b"NN\x81.",
    b"h\x07.",
    b"Q.",
    b"NQ.",
    b"e.",
    b"(NN.",
    b"\x80\x04N.",
    b"\xff.",
]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_bombs_and_nonsense_stay_small(tmp_path: Path) -> None:
    """One sentence each, in a process that may take 512 MiB more than it has after its imports."""
    for index, body in enumerate(BOMBS):
        (tmp_path / f"{index:02d}.pkl").write_bytes(b"\x80\x04" + body)
    script = (
        "import pathlib, resource, sys\n"
        "from uni3d.diffusion.edm_import import import_edm\n"
        "from uni3d.errors import UsageError\n"
        "pages = int(pathlib.Path('/proc/self/statm').read_text().split()[0])\n"
        "limit = pages * resource.getpagesize() + 2**29\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "for file in sorted(pathlib.Path(sys.argv[1]).glob('*.pkl')):\n"
        "    try:\n"
        "        import_edm(file, file.with_suffix('.out'))\n"
        "    except UsageError as error:\n"
        "        print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert len(result.stdout.splitlines()) == len(BOMBS)
    assert len(os.listdir(tmp_path)) == len(BOMBS)


def test_limits_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edm_import, "MAX_FILE_BYTES", 10)
    with pytest.raises(UsageError, match="networks of this kind have at most"):
        import_edm(write(tmp_path, snapshot(network())), tmp_path / "out")
