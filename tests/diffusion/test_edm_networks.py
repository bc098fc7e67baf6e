"""EDM networks: the published sizes and names, numbers against a plain reference, precision and gradients."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from edm_reference import reference_denoise
from torch import Tensor
from torch.nn import functional

from uni3d.diffusion import edm
from uni3d.diffusion.edm import PRESETS, EDMConfig, EDMDenoiser, preset
from uni3d.diffusion.edm_unet import Block, BlockStyle, Conv2d, Init, box_or_fir
from uni3d.errors import ConfigError

# arXiv 2206.00364, Table 7, and the state dicts of EDM's own networks.
PUBLISHED = [
    ("cifar10-32x32-uncond-vp", 55.734, 425),
    ("cifar10-32x32-cond-vp", 55.735, 427),
    ("cifar10-32x32-uncond-ve", 56.398, 432),
    ("imagenet-64x64-cond-adm", 295.899, 553),
]
SMALL = {"resolution": 8, "num_blocks": 1, "attention_resolutions": (4,)}
SMALL_CONFIGS = {
    "ddpm++": dataclasses.replace(
        preset("cifar10-32x32-cond-vp"), model_channels=16, channel_mult=(1, 2), **SMALL
    ),
    "ncsn++": dataclasses.replace(
        preset("cifar10-32x32-cond-ve"), model_channels=16, channel_mult=(1, 2, 2), **SMALL
    ),
    "adm": dataclasses.replace(
        preset("imagenet-64x64-cond-adm"),
        model_channels=64,
        channel_mult=(1, 2),
        label_dim=10,
        augment_dim=9,
        **SMALL,
    ),
}


def randomised(config: EDMConfig, seed: int = 0) -> EDMDenoiser:
    """A network in eval mode all of whose parameters matter: none is zero or one as at the start."""
    net = EDMDenoiser(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 16
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
    return net


def batch(config: EDMConfig, num: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    side = config.resolution
    sigma = torch.tensor([0.01, 0.7, 30.0])[:num]
    x = torch.randn(num, config.image_channels, side, side, generator=generator)
    labels = functional.one_hot(torch.tensor([1, 7, 2])[:num], config.label_dim).float()
    return x * (sigma**2 + 0.25).sqrt().reshape(-1, 1, 1, 1), sigma, labels


def c_out(sigma: Tensor) -> Tensor:
    return (0.5 * sigma / (sigma**2 + 0.25).sqrt()).reshape(-1, 1, 1, 1)


@pytest.fixture(params=list(SMALL_CONFIGS))
def config(request: pytest.FixtureRequest) -> EDMConfig:
    return SMALL_CONFIGS[request.param]


@pytest.mark.parametrize(("name", "millions", "num_entries"), PUBLISHED)
def test_published_networks_have_their_published_size(name: str, millions: float, num_entries: int) -> None:
    net = edm.skeleton(preset(name))
    num_parameters = sum(parameter.numel() for parameter in net.parameters())
    assert round(num_parameters / 1e6, 3) == millions
    assert len(net.state_dict()) == num_entries


def test_names_and_shapes_are_those_of_the_files() -> None:
    def shapes(name: str) -> dict[str, tuple[int, ...]]:
        return {key: tuple(value.shape) for key, value in edm.skeleton(preset(name)).state_dict().items()}

    vp, ve, adm = (shapes(row[0]) for row in (PUBLISHED[1], PUBLISHED[2], PUBLISHED[3]))
    assert vp["model.map_label.weight"] == (128, 10) and vp["model.map_label.bias"] == (128,)
    assert vp["model.map_augment.weight"] == (128, 9) and "model.map_augment.bias" not in vp
    assert vp["model.enc.32x32_conv.weight"] == (128, 3, 3, 3)
    assert vp["model.enc.16x16_down.conv0.resample_filter"] == (1, 1, 2, 2)
    assert vp["model.enc.16x16_down.skip.weight"] == (256, 256, 1, 1)
    assert vp["model.enc.16x16_block3.qkv.weight"] == (768, 256, 1, 1)
    assert "model.dec.16x16_block3.qkv.weight" not in vp and "model.dec.16x16_block4.qkv.weight" in vp
    assert "model.dec.8x8_in0.qkv.weight" in vp and "model.dec.8x8_in1.qkv.weight" not in vp
    assert vp["model.dec.32x32_block4.conv0.weight"] == (256, 384, 3, 3)
    assert vp["model.dec.32x32_aux_conv.weight"] == (3, 256, 3, 3) and "model.dec.32x32_aux_norm.bias" in vp
    assert ve["model.map_noise.freqs"] == (128,) and ve["model.map_layer0.weight"] == (512, 256)
    assert ve["model.enc.16x16_aux_residual.weight"] == (256, 3, 3, 3)
    assert ve["model.enc.8x8_aux_residual.resample_filter"] == (1, 1, 4, 4)
    assert "model.map_noise.freqs" not in vp
    assert adm["model.map_label.weight"] == (768, 1000) and "model.map_label.bias" not in adm
    assert adm["model.enc.32x32_down.skip.resample_filter"] == (1, 1, 2, 2)
    assert "model.enc.32x32_down.skip.weight" not in adm and "model.map_augment.weight" not in adm
    assert adm["model.enc.8x8_block0.affine.weight"] == (2 * 768, 768)
    assert "model.enc.32x32_block0.qkv.weight" in adm and "model.enc.64x64_block0.qkv.weight" not in adm
    assert adm["model.out_conv.weight"] == (3, 192, 3, 3) and "model.out_norm.weight" in adm


def test_outputs_equal_the_reference(config: EDMConfig) -> None:
    net = randomised(config)
    x, sigma, labels = batch(config)
    augment_labels = torch.randn(3, 9, generator=torch.Generator().manual_seed(2))
    state = {name: tensor.double() for name, tensor in net.state_dict().items()}
    expected = reference_denoise(state, x.double(), sigma.double(), labels.double())
    actual = net(x, sigma, labels)
    assert actual.dtype == torch.float32 and actual.shape == x.shape
    scale = c_out(sigma)  # the error of F, which is of order one
    assert ((actual - expected) / scale).abs().max() < 1e-4
    torch.testing.assert_close(net(x, sigma, torch.tensor([1, 7, 2])), actual, rtol=0, atol=0)
    expected = reference_denoise(state, x.double(), sigma.double(), labels.double(), augment_labels.double())
    actual = net(x, sigma, labels, augment_labels=augment_labels)
    assert ((actual - expected) / scale).abs().max() < 1e-4
    assert not torch.allclose(actual, net(x, sigma, labels))


def test_an_unconditional_network_equals_the_reference() -> None:
    config = dataclasses.replace(SMALL_CONFIGS["ddpm++"], label_dim=0, augment_dim=0)
    net = randomised(config)
    x, sigma, labels = batch(SMALL_CONFIGS["ddpm++"])
    state = {name: tensor.double() for name, tensor in net.state_dict().items()}
    torch.testing.assert_close(
        net(x, sigma), reference_denoise(state, x.double(), sigma.double()).float(), rtol=1e-4, atol=1e-4
    )
    with pytest.raises(ValueError, match="unconditional network; leave them out"):
        net(x, sigma, labels)
    with pytest.raises(ValueError, match="augment_labels were given to a network without"):
        net(x, sigma, augment_labels=torch.zeros(3, 9))


def test_attention_reads_interleaved_rows() -> None:
    """Row 3 * (head * size + c) + {0, 1, 2} of the projection is {q, k, v} of channel c of that head."""
    size, heads = 4, 2
    style = BlockStyle(
        embedding_channels=8,
        dropout=0.0,
        eps=1e-5,
        gain=1.0,
        has_scale=False,
        always_projects=False,
        head_channels=size,
        taps=(1, 1),
        init=Init("xavier_uniform"),
        init_last=Init("xavier_uniform"),
        init_attention=Init("xavier_uniform"),
    )
    block = Block(size * heads, size * heads, style, has_attention=True)
    generator = torch.Generator().manual_seed(0)
    for module in (block.qkv, block.proj):
        assert module.weight is not None and module.bias is not None
        module.init.fill(module.weight, module.bias, generator)
        module.bias.data.normal_(generator=generator)
    x = torch.randn(2, size * heads, 3, 5, generator=generator)
    rows = functional.conv2d(block.norm2(x), block.qkv.weight, block.qkv.bias)
    rows = rows.reshape(2, heads, size, 3, 15)
    q, k, v = rows[:, :, :, 0], rows[:, :, :, 1], rows[:, :, :, 2]
    weight = (torch.einsum("bhcq,bhck->bhqk", q, k) / size**0.5).softmax(dim=-1)
    mixed = torch.einsum("bhqk,bhck->bhcq", weight, v).reshape(2, size * heads, 3, 5)
    expected = functional.conv2d(mixed, block.proj.weight, block.proj.bias)
    torch.testing.assert_close(block._attention(x), expected, rtol=1e-5, atol=1e-5)


def test_box_filters_are_pooling_and_repetition() -> None:
    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    kernel = box_or_fir((1, 1)).expand(3, 1, 2, 2)
    down = Conv2d(3, 3, 0, Init("xavier_uniform"), resample="down")
    torch.testing.assert_close(down(x), functional.conv2d(x, kernel, stride=2, groups=3))
    up = Conv2d(3, 3, 0, Init("xavier_uniform"), resample="up")
    torch.testing.assert_close(up(x), functional.conv_transpose2d(x, 4 * kernel, stride=2, groups=3))
    torch.testing.assert_close(down(up(x)), x)


def test_the_wide_filter_is_that_of_ncsnpp() -> None:
    line = torch.tensor([1, 3, 3, 1]) / 8
    torch.testing.assert_close(box_or_fir((1, 3, 3, 1))[0, 0], line[:, None] * line[None, :])
    flat = torch.ones(1, 2, 8, 8)
    for resample in ("up", "down"):
        changed = Conv2d(2, 2, 0, Init("xavier_uniform"), resample=resample, taps=(1, 3, 3, 1))(flat)
        torch.testing.assert_close(changed[:, :, 1:-1, 1:-1], torch.ones_like(changed[:, :, 1:-1, 1:-1]))


@pytest.mark.parametrize("body", list(SMALL_CONFIGS))
def test_a_fresh_network_begins_near_its_skip(body: str) -> None:
    """F starts at zero (ADM) or nearly (SongUNet), so D is c_skip x."""
    config = SMALL_CONFIGS[body]
    net = EDMDenoiser(config, generator=torch.Generator().manual_seed(0)).eval()
    x, sigma, labels = batch(config)
    c_skip = (0.25 / (sigma**2 + 0.25)).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(net(x, sigma, labels), c_skip * x, rtol=1e-3, atol=1e-3)
    again = EDMDenoiser(config, generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))
    assert any(parameter.std() > 0.05 for parameter in net.parameters())
    if body == "ncsn++":
        assert 5 < net.state_dict()["model.map_noise.freqs"].std() < 30


def test_preconditioning_at_its_ends(config: EDMConfig) -> None:
    """Table 1: D -> x without noise; all that is left at high noise is sigma_data F, bounded in sigma."""
    net = randomised(config)
    x, _, labels = batch(config)
    torch.testing.assert_close(net(x, 0.0, labels), x, rtol=0, atol=0)
    torch.testing.assert_close(net(x, torch.full((3,), 1e-6), labels), x, rtol=0, atol=1e-4)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    large = net(1e5 * noise, 1e5, labels)
    inner = net.model.embed(torch.full((3,), math.log(1e5) / 4), labels, None)
    hidden, skips = net.model.encode(noise, inner)
    torch.testing.assert_close(large, 0.5 * net.model.decode(hidden, skips, inner), rtol=1e-3, atol=1e-3)


def test_preconditioning_keeps_unit_variance() -> None:
    """Eq. 7 with F replaced by white noise: the target of F, (x0 - c_skip x) / c_out, has unit variance."""
    generator = torch.Generator().manual_seed(0)
    x0 = 0.5 * torch.randn(100_000, generator=generator, dtype=torch.float64)
    eps = torch.randn(100_000, generator=generator, dtype=torch.float64)
    net = randomised(SMALL_CONFIGS["ddpm++"])
    for sigma in (0.02, 0.5, 10.0):
        # Read c_skip and c_out off the network: D is affine in its input around a body that is constant.
        zero = torch.zeros(1, 3, 8, 8)
        net.model.decode = lambda *_, zero=zero: zero  # type: ignore[method-assign]
        c_skip = net(zero + 1, sigma)[0, 0, 0, 0].item()
        net.model.decode = lambda *_, zero=zero: zero + 1  # type: ignore[method-assign]
        c_out = net(zero, sigma)[0, 0, 0, 0].item()
        target = (x0 - c_skip * (x0 + sigma * eps)) / c_out
        assert target.std().item() == pytest.approx(1, abs=0.01)


def test_class_rows_are_scaled_by_the_root_of_their_number() -> None:
    config = SMALL_CONFIGS["ddpm++"]
    net = randomised(config)
    seen: list[Tensor] = []
    assert net.model.map_label is not None
    net.model.map_label.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    x, sigma, labels = batch(config)
    net(x, sigma, labels)
    torch.testing.assert_close(seen[0], labels * math.sqrt(10))
    net(x, sigma)
    assert not seen[1].any() and seen[1].shape == (3, 10)
    torch.testing.assert_close(net(x, sigma, labels[:1]), net(x, sigma, labels[:1].expand(3, -1)))


def test_a_bfloat16_body_is_close(config: EDMConfig) -> None:
    net = randomised(config)
    x, sigma, labels = batch(config)
    exact, exact_features = net.x0_and_features(x, sigma, labels)
    dtypes: set[torch.dtype] = set()
    embedded: set[torch.dtype] = set()
    for module in net.modules():
        if isinstance(module, Block):
            module.norm0.register_forward_hook(lambda *hooked: dtypes.add(hooked[2].dtype))
            module.affine.register_forward_hook(lambda *hooked: embedded.add(hooked[2].dtype))
    net.body_dtype = torch.bfloat16
    rough, features = net.x0_and_features(x, sigma, labels)
    assert rough.dtype == features.dtype == torch.float32
    assert dtypes == {torch.bfloat16} and embedded == {torch.float32}
    scale = c_out(sigma)
    error = ((rough - exact) / scale).abs()
    assert 0 < error.max() < 0.1 and error.mean() < 0.015
    assert (features - exact_features).norm() / exact_features.norm() < 0.02
    assert all(parameter.dtype == torch.float32 for parameter in net.parameters())


def test_features_equal_those_of_the_full_pass(config: EDMConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    net = randomised(config)
    x, sigma, labels = batch(config)
    x0, features = net.x0_and_features(x, sigma, labels)
    side = config.feature_resolution
    assert features.shape == (3, config.feature_channels, side, side)
    torch.testing.assert_close(net(x, sigma, labels), x0, rtol=0, atol=0)
    # The decoder begins from them.
    first = next(iter(net.model.dec.values()))
    seen: list[Tensor] = []
    first.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    net(x, sigma, labels)
    torch.testing.assert_close(seen[0], features, rtol=0, atol=0)
    monkeypatch.setattr(net.model, "decode", lambda *_: pytest.fail("the decoder ran"))
    torch.testing.assert_close(net.features(x, sigma, labels), features, rtol=0, atol=0)


def test_gradients_reach_everything(config: EDMConfig) -> None:
    net = randomised(config).train()
    x, sigma, labels = batch(config)
    x.requires_grad_(True)
    x0, features = net(x, sigma, labels, augment_labels=torch.ones(3, 9), output="both")
    (x0.square().mean() + features.square().mean()).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.any(), name
    assert x.grad is not None and x.grad.abs().amax(dim=(1, 2, 3)).min() > 0
    plain = randomised(config)
    plain(x.detach(), sigma, labels).square().mean().backward()
    unused = {name for name, parameter in plain.named_parameters() if parameter.grad is None}
    assert unused == {"model.map_augment.weight"}


def test_gradients_equal_the_reference(config: EDMConfig) -> None:
    net = randomised(config).double()
    x, sigma, labels = batch(config)
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    state = {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}
    mine, theirs = (x.clone().double().requires_grad_(True) for _ in range(2))
    ours = net(mine, sigma, labels)  # float32 inside, whatever the parameters are
    (ours * weight).sum().backward()
    (reference_denoise(state, theirs, sigma.double(), labels.double()) * weight).sum().backward()
    assert mine.grad is not None and theirs.grad is not None
    scale = theirs.grad.abs().amax(dim=(1, 2, 3), keepdim=True)
    assert ((mine.grad - theirs.grad) / scale).abs().max() < 1e-4


def test_dropout_acts_in_training_only(config: EDMConfig) -> None:
    net = randomised(config)
    x, sigma, labels = batch(config)
    assert torch.equal(net(x, sigma, labels), net(x, sigma, labels))
    net.train()
    assert not torch.equal(net(x, sigma, labels), net(x, sigma, labels))
    still = EDMDenoiser(dataclasses.replace(config, dropout=0.0))
    still.load_state_dict(net.state_dict())
    assert torch.equal(still.train()(x, sigma, labels), net.eval()(x, sigma, labels))


def test_label_dropout_forgets_labels_in_training() -> None:
    config = dataclasses.replace(SMALL_CONFIGS["adm"], dropout=0.0, label_dropout=1.0)
    net = randomised(config)
    x, sigma, labels = batch(config)
    assert not torch.allclose(net(x, sigma, labels), net(x, sigma))
    net.train()
    torch.testing.assert_close(net(x, sigma, labels), net(x, sigma))


def test_memory_format_and_sigma_forms_do_not_matter(config: EDMConfig) -> None:
    net = randomised(config)
    x, _, labels = batch(config)
    expected = net(x, 0.7, labels)
    for sigma in (torch.tensor(0.7), torch.full((3,), 0.7), torch.full((3, 1, 1, 1), 0.7)):
        torch.testing.assert_close(net(x, sigma, labels), expected)
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    moved = net(x.to(memory_format=torch.channels_last), 0.7, labels)
    torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [row[0] for row in PUBLISHED])
def test_a_pass_never_reads_a_value(name: str) -> None:
    """Tensors without values cannot be waited for: whatever would make the host wait raises here."""
    config = preset(name)
    net = edm.skeleton(config, body_dtype=torch.bfloat16).train()
    x = torch.empty(2, 3, config.resolution, config.resolution, device="meta")
    labels = torch.empty(2, config.label_dim, device="meta") if config.label_dim else None
    x0, features = net.x0_and_features(x, torch.empty(2, device="meta"), labels)
    assert x0.shape == x.shape and features.shape[1] == config.feature_channels
    assert net(x, 2.5, labels).dtype == torch.float32


def test_a_pass_is_one_graph(config: EDMConfig) -> None:
    net = randomised(config)
    x, sigma, labels = batch(config)
    torch.compiler.reset()  # the code of `forward` is shared by all networks, and so is its count of graphs
    compiled = torch.compile(net, fullgraph=True, dynamic=False, backend="eager")
    torch.testing.assert_close(compiled(x, sigma, labels), net(x, sigma, labels), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(compiled(x, 2.5, torch.tensor([1, 7, 2])), net(x, 2.5, labels))
    features = compiled(x, sigma, labels, output="features")
    torch.testing.assert_close(features, net.features(x, sigma, labels), rtol=1e-5, atol=1e-5)


def test_wrong_shapes_are_refused(config: EDMConfig) -> None:
    net = edm.skeleton(config)
    side = config.resolution
    with pytest.raises(ValueError, match=rf"expected \[B, 3, {side}, {side}\]"):
        net(torch.zeros(2, 3, side, side + 2), 1.0)
    with pytest.raises(ValueError, match=r"expected \[2, 10\] or integer \[2\]"):
        net(torch.zeros(2, 3, side, side), 1.0, torch.zeros(2, 3))


def test_configurations_survive_json() -> None:
    for config in (*PRESETS.values(), *SMALL_CONFIGS.values()):
        assert EDMConfig.from_dict(json.loads(json.dumps(config.as_dict()))) == config
        hash(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"body": "unet"}, "body is 'unet'; expected one of ddpm"),
        ({"resolution": 10**9}, "resolution is 1000000000; expected a whole number from 4 to 1024"),
        ({"resolution": 30}, "resolution is 30; 3 levels need a multiple of 4"),
        ({"num_blocks": True}, "num_blocks is True; expected a whole number"),
        ({"num_blocks": 1.0}, "num_blocks is 1.0; expected a whole number"),
        ({"model_channels": 18}, "model_channels is 18; expected a multiple of 4"),
        ({"channel_mult": ()}, "channel_mult is empty"),
        ({"channel_mult": (2,) * 99}, "expected at most 8 whole numbers"),
        ({"channel_mult": (0,)}, "channel_mult is 0"),
        ({"channel_mult": 7}, "channel_mult is 7"),
        ({"attention_resolutions": ("16",)}, "attention_resolutions is '16'"),
        ({"dropout": math.nan}, "dropout is nan; expected a number from 0 to 1"),
        ({"sigma_data": 0}, "sigma_data is 0"),
        ({"label_dropout": [1] * 9}, "label_dropout is "),
    ],
)
def test_impossible_configurations_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("+", r"\+")):
        dataclasses.replace(preset("cifar10-32x32-uncond-vp"), **changes)  # type: ignore[arg-type]


def test_names_of_networks_and_fields_are_checked() -> None:
    with pytest.raises(ConfigError, match="did you mean 'imagenet-64x64-cond-adm'"):
        preset("imagenet-64x64-adm")
    values = preset("cifar10-32x32-uncond-vp").as_dict()
    with pytest.raises(ConfigError, match="unknown settings of an EDM network: depth"):
        EDMConfig.from_dict({**values, "depth": 3})
    del values["body"]
    with pytest.raises(ConfigError, match="missing settings of an EDM network: body"):
        EDMConfig.from_dict(values)
    odd = dataclasses.replace(SMALL_CONFIGS["adm"], model_channels=36, channel_mult=(4,))
    with pytest.raises(ConfigError, match="144 channels, which 32 groups do not divide"):
        edm.skeleton(odd)
    with pytest.raises(ConfigError, match="channels for 3 attention heads"):
        edm.skeleton(dataclasses.replace(SMALL_CONFIGS["adm"], model_channels=224, channel_mult=(1,)))


def test_the_decoder_can_leave_images_out() -> None:
    config = SMALL_CONFIGS["ddpm++"]
    net = randomised(config)
    x, sigma, labels = batch(config)
    x0, features = net(x, sigma, labels, output="both", num_decoded=2)
    all_x0, all_features = net(x, sigma, labels, output="both")
    assert x0.shape[0] == 2 and features.shape[0] == 3
    torch.testing.assert_close(x0, all_x0[:2], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(features, all_features)
