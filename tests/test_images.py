"""Images: a tiny LLaVA with its real processor, through the script and the trainer."""

import json
import random
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset, Image, List
from peft import LoraConfig
from PIL import Image as Pictures
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2Config,
)

from cfpo_trl import CFPOConfig, CFPOTrainer, grpo
from cfpo_trl.mistakes import Mistake
from cfpo_trl.rewards.texts import text_of
from cfpo_trl.running.data import render
from cfpo_trl.running.images import check_images, placeholders_of, with_images
from cfpo_trl.tiny.model import build_model, build_tokenizer
from conftest import CPU

COLORS = {"r": (255, 0, 0), "g": (0, 255, 0), "b": (0, 0, 255)}
TEMPLATE = (
    "{% for m in messages %}{% for p in m.content %}{% if p.type == 'image' %}<image>{% else %}{{ p.text }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A LLaVA of four patches to an image, in a folder, with its processor."""
    path = tmp_path_factory.mktemp("llava")
    tokenizer = build_tokenizer("abcdefghijklmnopqrstuvwxyz >")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    text = Qwen2Config(
        vocab_size=len(tokenizer), num_key_value_heads=2, max_position_embeddings=256, **sizes, **tokens
    )
    vision = CLIPVisionConfig(image_size=16, patch_size=8, **sizes)
    options = {"image_token_id": image_token, "vision_feature_layer": -1, "image_seq_length": 4}
    config = LlavaConfig(vision_config=vision, text_config=text, **options)
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(path)
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    options = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    LlavaProcessor(pictures, tokenizer, chat_template=TEMPLATE, **options).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder with a picture for each color, and rows that ask for it: some text of three letters."""
    folder, rng = tmp_path_factory.mktemp("pictures"), random.Random(0)
    for name, color in COLORS.items():
        Pictures.new("RGB", (20, 20), color).save(folder / f"{name}.png")
    names = [rng.choice("rgb") for _ in range(24)]
    return folder, [{"prompt": "abc", "image": f"{name}.png", "solution": name} for name in names]


def early_letters(completions, image, **kwargs):
    """A dense reward; the column of images comes to it, too."""
    assert all(picture.size == (20, 20) for picture in image)
    return [sum(letter < "m" for letter in text_of(completion)) / 3 for completion in completions]


@pytest.fixture
def recipe(model, pictures, tmp_path):
    def write(form="jsonl", rows=None, **options):
        folder, given = pictures
        data = folder / f"{tmp_path.name}.{form}"
        if form == "jsonl":
            data.write_text("".join(json.dumps(row) + "\n" for row in rows or given))
        else:
            cells = [row | {"image": str(folder / row["image"])} for row in given]
            Dataset.from_list(cells).cast_column("image", Image()).to_parquet(data)
        path = tmp_path / "recipe.yaml"
        defaults = {
            "model_name_or_path": str(model),
            "dtype": "float32",
            "dataset_name": str(data),
            "reward_funcs": ["test_images.early_letters"],
            "num_iterations": 2,
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "max_completion_length": 3,
            "max_steps": 4,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            **CPU,
            "save_strategy": "no",
            "output_dir": str(tmp_path / "out"),
        }
        path.write_text(yaml.safe_dump(defaults | options))
        return ["--config", str(path)]

    return write


def logged(tmp_path):
    return json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_the_script_trains_and_shows_the_image_in_the_first_prompt(recipe, tmp_path, model, form, caplog):
    with caplog.at_level("INFO", logger="cfpo_trl"):
        grpo.main(recipe(form, max_prompt_length=20))
    assert "The first prompt, as the model sees it:\n<image>abc>" in caplog.text
    log = [entry for entry in logged(tmp_path) if "loss" in entry]
    assert len(log) == 4
    assert log[0]["cfpo/tv"] == pytest.approx(0, abs=1e-6)
    assert log[1]["cfpo/tv"] > 1e-5  # the second update of a batch
    before, after = (AutoModelForImageTextToText.from_pretrained(path) for path in (model, tmp_path / "out"))
    for part in ("vision_tower", "multi_modal_projector", "language_model"):
        pairs = zip(before.named_parameters(), after.parameters(), strict=True)
        assert any(part in name and not torch.equal(old, new) for (name, old), new in pairs), part


def test_evaluation_and_another_chat_template(recipe, tmp_path, caplog):
    template = "Q{{ '' }}" + TEMPLATE
    with caplog.at_level("INFO", logger="cfpo_trl"):
        grpo.main(
            recipe(
                chat_template=template,
                dataset_test_split="train",
                eval_strategy="steps",
                eval_steps=2,
                num_generations_eval=1,
                per_device_eval_batch_size=8,
            )
        )
    assert "as the model sees it:\nQ<image>abc>" in caplog.text
    assert AutoProcessor.from_pretrained(tmp_path / "out").chat_template == template
    assert sum("eval_reward" in entry for entry in logged(tmp_path)) >= 2


def test_lora(recipe, tmp_path):
    targets = {"use_peft": True, "lora_r": 2, "lora_target_modules": ["q_proj", "v_proj"]}
    grpo.main(recipe(**targets))
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert logged(tmp_path)[1]["cfpo/tv"] > 0


def conversation(name: str) -> list[dict]:
    return [{"role": "user", "content": name}]


@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=2, target_modules=["q_proj"])], ids=["full", "lora"])
@pytest.mark.parametrize("column", ["image", "images"])
def test_loss_and_gradient_are_cfpo_s_and_reach_the_vision_tower(model, pictures, tmp_path, column, peft_config):
    """Against the paper's objective, from a forward of our own over the trainer's batch."""
    folder, rows = pictures
    cells = [str(folder / row["image"]) for row in rows]
    data = Dataset.from_list([{"prompt": conversation("abc")} for _ in rows])
    data = data.add_column(column, cells if column == "image" else [[cell] for cell in cells])
    data = data.cast_column(column, Image() if column == "image" else List(Image()))
    trainer = CFPOTrainer(
        LlavaForConditionalGeneration.from_pretrained(model),
        lambda completions, **kwargs: [float(len(completion[0]["content"])) for completion in completions],
        CFPOConfig(
            str(tmp_path / "out"),
            num_iterations=2,
            per_device_train_batch_size=8,
            num_generations=4,
            max_completion_length=4,
            max_steps=2,
            loss_type="bnpo",
            learning_rate=1e-2,
            save_strategy="no",
            **CPU,
        ),
        data,
        processing_class=AutoProcessor.from_pretrained(model),
        peft_config=peft_config,
    )
    checked, original = [], trainer.compute_loss

    def compare(module, inputs, *arguments, **keywords):
        trained = [param for param in module.parameters() if param.requires_grad]
        loss = original(module, inputs, *arguments, **keywords)
        gradients = torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True)
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attended = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        length = inputs["completion_ids"].shape[1]
        logits = module(input_ids=ids, attention_mask=attended, pixel_values=inputs["pixel_values"]).logits
        logps = logits[:, -length - 1 : -1].log_softmax(-1).gather(-1, inputs["completion_ids"][..., None])[..., 0]
        old = inputs.get("old_per_token_logps")
        ratio = (logps - (logps.detach() if old is None else old)).exp()
        advantages = inputs["advantages"][:, None]
        objective = ratio * advantages - advantages.abs() * (ratio - 1) ** 2 / (2 * 0.2)
        mask = inputs["completion_mask"]
        expected = -(objective * mask).sum() / mask.sum()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)
        reference = torch.autograd.grad(expected, trained, allow_unused=True)
        for mine, other in zip(gradients, reference, strict=True):
            if other is not None:
                assert torch.allclose(mine, other, rtol=1e-3, atol=1e-6)
        names = [name for name, param in module.named_parameters() if param.requires_grad]
        reached = {
            name.partition("vision_tower")[1]
            for name, gradient in zip(names, gradients, strict=True)
            if gradient is not None and gradient.abs().max() > 0
        }
        checked.append((((ratio - 1).abs() * mask).sum() / mask.sum() / 2).item())
        assert "vision_tower" in reached or (peft_config is not None and len(checked) == 1)  # LoRA's B begins at 0
        return loss

    trainer.compute_loss = compare
    trainer.train()
    assert len(checked) == 2
    assert checked[1] > 1e-4


def test_paths_are_found_beside_the_file_and_missing_ones_are_named(pictures, tmp_path):
    folder, rows = pictures
    data = with_images(Dataset.from_list(rows), str(folder / "data.jsonl"))
    assert data[0]["image"].size == (20, 20)
    assert [len(images) for images in placeholders_of(data.select(range(2)))] == [1, 1]
    several = Dataset.from_list([{"images": ["r.png", "g.png"]}, {"images": []}])
    several = with_images(several, str(folder))
    assert [picture.size for picture in several[0]["images"]] == [(20, 20)] * 2
    assert [len(images) for images in placeholders_of(several)] == [2, 0]
    with pytest.raises(ValueError, match="Row 1 has image='x.png', which is no file here or in"):
        with_images(Dataset.from_list([{"image": "r.png"}, {"image": "x.png"}]), str(folder))
    with pytest.raises(ValueError, match="columns image and images"):
        with_images(Dataset.from_list([{"image": "r.png", "images": ["r.png"]}]), str(folder))


def test_images_for_a_model_that_takes_none(model, pictures):
    data = Dataset.from_list(pictures[1])
    with pytest.raises(ValueError, match="column 'image', and the model has no processor of images"):
        check_images(data, build_tokenizer("ab"), False)
    with pytest.raises(ValueError, match="TRL's asynchronous trainer takes text alone"):
        check_images(data, AutoProcessor.from_pretrained(model), True)


def test_a_text_model_refuses_images_in_a_line(recipe, tmp_path):
    tokenizer = build_tokenizer("abc")
    tokenizer.chat_template = "{{ messages[0].content }}"
    build_model(tokenizer).save_pretrained(tmp_path / "text")
    tokenizer.save_pretrained(tmp_path / "text")
    with pytest.raises(Mistake, match="no processor of images"):
        grpo.main(recipe(model_name_or_path=str(tmp_path / "text")))


def test_a_picture_that_is_missing_ends_the_start(recipe, pictures):
    rows = [*pictures[1], {"prompt": "a", "image": "none.png", "solution": "r"}]
    with pytest.raises(Mistake, match="Row 24 has image='none.png', which is no file"):
        grpo.main(recipe(rows=rows))


def test_more_pictures_than_placeholders_are_refused(model):
    processor = AutoProcessor.from_pretrained(model)
    parts = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "ab"}]}]
    assert render(parts, processor, images=[object()]) == "<image>ab>"
    with pytest.raises(ValueError, match="image"):
        render(parts, processor, images=[object(), object()])


def test_evaluation_by_lighteval_says_that_it_takes_no_images(model):
    from cfpo_trl.evaluation.checkpoint import CheckpointError, prepare

    with pytest.raises(CheckpointError, match="a model of images, and lighteval's tasks are of text"):
        prepare(str(model), Path("/nowhere"), {})
