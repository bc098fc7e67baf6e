"""CLIP, ImageReward and T3Bench's protocol on tiny random models of the real classes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from uni3d.errors import MissingWeightsError, UsageError
from uni3d.evaluation.image_reward import HEAD_FILE, ImageReward, reward_head
from uni3d.evaluation.retrieval import ClipEmbedding
from uni3d.evaluation.t3bench import sphere_cameras, sphere_quality, t3bench_quality, viewpoints

BOX = Path(__file__).parents[1] / "web" / "box.glb"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "chair", "blue", "vase"]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    from uni3d.teacher.tokenizer import train_tokenizer

    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = train_tokenizer(["a", "red", "chair", "blue", "vase"], context_length=8)
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 8,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = CLIPConfig(
        text_config=small | text, vision_config=small | {"image_size": 16, "patch_size": 8}, projection_dim=8
    )
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)
    return folder


def test_clip_embeds_as_its_own_processor_and_model_do(clip_folder: Path) -> None:
    from PIL import Image
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

    clip = ClipEmbedding(clip_folder)
    pixels = torch.randint(
        0, 256, (2, 16, 16, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    texts = ["a red chair", "a vase"]
    pictures = [Image.fromarray(picture.numpy()) for picture in pixels]
    model = CLIPModel.from_pretrained(clip_folder).eval()
    processed = CLIPImageProcessor.from_pretrained(clip_folder)(images=pictures, return_tensors="pt")
    tokens = AutoTokenizer.from_pretrained(clip_folder)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(
            pixel_values=processed["pixel_values"],
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
        )
    images = clip.image_embeddings(pixels.permute(0, 3, 1, 2).float() / 255)
    torch.testing.assert_close(images, expected.image_embeds, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(clip.text_embeddings(texts), expected.text_embeds, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(images.norm(dim=-1), torch.ones(2))


def test_clip_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MissingWeightsError, match="no CLIP model could be loaded"):
        ClipEmbedding(tmp_path)


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BertTokenizer, BlipConfig, BlipForImageTextRetrieval

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("reward")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": len(WORDS), "encoder_hidden_size": 16, "max_position_embeddings": 64}
    special = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3}
    config = BlipConfig(
        text_config=small | text | special, vision_config=small | {"image_size": 16, "patch_size": 8}
    )
    blip = BlipForImageTextRetrieval(config)
    for parameter in blip.parameters():  # initial weights are too small for a picture to make a difference
        parameter.data.mul_(20 if parameter.ndim > 1 else 1)
    blip.save_pretrained(folder)
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    save_file(reward_head(16).state_dict(), folder / HEAD_FILE)
    return folder


def test_image_reward_looks_at_picture_and_prompt(reward_folder: Path) -> None:
    judge = ImageReward(reward_folder)
    images = torch.rand(3, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    rewards = judge.score(images, "a red chair")
    assert rewards.shape == (3,) and rewards.isfinite().all()
    torch.testing.assert_close(judge.score(images[1:2], "a red chair"), rewards[1:2])
    assert len(set(rewards.tolist())) == 3
    assert not torch.allclose(judge.score(images, "a blue vase"), rewards, rtol=1e-6, atol=1e-9)


def test_image_reward_whose_parts_are_missing_or_do_not_fit(reward_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingWeightsError, match=HEAD_FILE):
        ImageReward(tmp_path)
    for file in reward_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(reward_head(8).state_dict(), tmp_path / HEAD_FILE)
    with pytest.raises(UsageError, match="does not fit its BLIP"):
        ImageReward(tmp_path)


def test_the_sphere_has_the_protocols_views() -> None:
    directions, neighbours = viewpoints()
    assert directions.shape == (162, 3) and {len(row) for row in neighbours} == {5, 6}
    positions = sphere_cameras(directions, 45.0).positions()
    torch.testing.assert_close(positions, torch.from_numpy(2.2 * directions).float(), atol=1e-5, rtol=0)


def test_the_best_smoothed_view_counts() -> None:
    # A ring of four: each is averaged with its two neighbours.
    neighbours = [[3, 1], [0, 2], [1, 3], [2, 0]]
    scores = torch.tensor([[0.0, 3.0], [0.0, 0.0], [-1.0, 0.0], [0.0, 0.0]])
    once = sphere_quality(scores, neighbours, num_rounds=1)
    assert once.best == pytest.approx(20 * 1 + 50) and once.worst == pytest.approx(50)
    assert once.mean == pytest.approx(20 * 0.75 + 50)
    # A constant stays what it is, whatever the smoothing.
    even = sphere_quality(torch.full((162, 5), 0.5), viewpoints()[1])
    assert (even.best, even.mean, even.worst) == pytest.approx((60, 60, 60))


def test_a_mesh_is_judged_from_every_side() -> None:
    seen = []

    def reward(images: torch.Tensor, prompt: str) -> torch.Tensor:
        seen.append(images)
        assert prompt == "a box"
        return 1 - images.mean(dim=(1, 2, 3))

    quality = t3bench_quality(BOX, "a box", reward, size=8)
    assert [len(images) for images in seen] == [162] * 5
    assert 50 < quality.worst <= quality.mean <= quality.best < 70
    # A longer lens shows the object larger, over the same black.
    assert seen[-1].mean() > seen[0].mean()
