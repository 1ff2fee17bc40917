"""Numbers of the official VILA-U implementation, recorded on tiny random checkpoints in the published layout.

Every size, count and key comes from the fixture's own files, so that other fixtures of the same kind can be
checked: set FIXTURES to the folder that holds vila_u_tiny/.
"""
import copy
import json

import pytest
import torch
import torch.nn.functional as F
from conftest import FIXTURES
from PIL import Image
from safetensors.torch import load_file

from evaluate import PUBLISHED
from model import IMAGE, NAMES, Sampling, chat, decision_logp, load, rename
from tokenizer import IMAGE_PLACEHOLDER, IMAGE_START, Sequence, pack, preprocess
from warmup import warmup_loss

FOLDER = FIXTURES / "vila_u_tiny"
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def model():
    return load(FOLDER).eval()


@pytest.fixture(scope="module")
def e():
    return load_file(FOLDER / "expected.safetensors")


@pytest.fixture(scope="module")
def v():
    return {k: x["value"] for k, x in json.loads((FOLDER / "expected.json").read_text())["values"].items()}


def close(got, expected, where=None, tolerance=TOLERANCE):
    if where is not None:
        got, expected = got[where.bool()], expected[where.bool()]
    assert got.shape == expected.shape and (got - expected).abs().max() <= tolerance


def arrays(model, ids, codes):
    """ids [B, T] with -200 at every image position, and the images' codes in order -> tokens, is_image."""
    is_image = ids == IMAGE_PLACEHOLDER
    tokens = F.pad(ids.clamp(min=0)[..., None], (0, model.vision_config.depth - 1))
    tokens[is_image] = codes.flatten(0, 1)
    return tokens, is_image


@torch.no_grad()
def test_encode(model, e):
    pixels = e["encode.pixel_values"]
    close(model.vision.tower(pixels).view_as(e["encode.features"]), e["encode.features"])
    codes = model.vision.encode(pixels)
    assert torch.equal(codes, e["encode.codes"].flatten(1, 2))
    vectors = model.vision.vectors(codes)
    close(vectors, e["encode.code_embeddings"])
    close(vectors.sum(-2).view_as(e["encode.z_q"]), e["encode.z_q"])
    close(model.projector(vectors.sum(-2)), e["encode.projected"])


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_text_logits(model, e, side):
    """Our rows have no padding: each is compared without it."""
    ids, mask = e[f"text.{side}.input_ids"], e[f"text.{side}.attention_mask"].bool()
    for row, where, logits in zip(ids, mask, e[f"text.{side}.logits"]):
        row = pack([row[where].tolist()], model.vision_config.depth)
        ours = model.decoder.lm_head(model(row.tokens[None], row.is_image[None]))[0]
        close(official_vocabulary(ours, logits), logits[where])


def official_vocabulary(ours, theirs):
    """Our logits without the rows of the tokens that we added."""
    return ours[..., :theirs.shape[-1]]


@torch.no_grad()
def greedy(model, prompts, expected):
    """Greedy continuations of a ragged batch; the added tokens' mean rows never win here."""
    n, rows = expected.shape[1], model.generate(prompts, 1, expected.shape[1], Sampling(temperature=0))
    for got, ids in zip(rows, expected):
        ids = ids[:len(got.tokens)]
        assert torch.equal(got.tokens[:, 0], ids)
        assert len(got.tokens) == n or ids[-1] == model.text.id("</s>")


def test_greedy_text(model, e):
    masks = e["text.left.attention_mask"].bool()
    rows = [ids[mask].tolist() for ids, mask in zip(e["text.left.input_ids"], masks)]
    greedy(model, [pack([row], model.vision_config.depth) for row in rows], e["text.left.greedy_ids"])


@torch.no_grad()
def test_understanding(model, e):
    codes = iter(model.vision.encode(e["understand.pixel_values"]))
    parts = []
    for i in e["understand.input_ids"][0].tolist():
        parts.append(next(codes) if i == IMAGE_PLACEHOLDER else [i])
    prompt = pack(parts, model.vision_config.depth)
    first = model.decoder.lm_head(model(prompt.tokens[None], prompt.is_image[None])[:, -1])
    close(official_vocabulary(first, e["understand.first_logits"]), e["understand.first_logits"])
    greedy(model, [prompt], e["understand.greedy_ids"])


@torch.no_grad()
def test_interleaved_teacher_forcing(model, e):
    ids, real = e["inter.input_ids"], e["inter.attention_mask"]
    tokens, is_image = arrays(model, ids, e["inter.image_codes"])
    close(model.embed(tokens, is_image), e["inter.inputs_embeds"], real)
    hidden = model(tokens, is_image)
    close(hidden, e["inter.hidden_states"], real)
    ours, theirs = model.decoder.lm_head(hidden), e["inter.text_logits"]
    close(official_vocabulary(ours, theirs), theirs, real)
    before = hidden[:, :-1][is_image[:, 1:]]
    logits = model.depth(before, model.vision.vectors(tokens[is_image]))
    close(logits, e["inter.rq_logits"].flatten(0, 1))


@torch.no_grad()
def test_log_probs_of_every_decision(model, e):
    """The scoring function on both kinds of decisions at once, the added tokens left out of the softmax."""
    tokens, is_image = arrays(model, e["inter.input_ids"], e["inter.image_codes"])
    text = e["logprob.text_mask"].bool()
    mask = torch.zeros(tokens.shape, dtype=torch.bool)
    mask[..., 0], mask[is_image] = text, True
    with published_vocabulary(model, e["inter.text_logits"].shape[-1]):
        logp = model.log_probs(tokens, is_image, mask)
    close(logp[..., 0], e["logprob.text"], text)
    close(logp[is_image], e["logprob.image"].flatten(0, 1))
    assert (logp.sum((1, 2)) - e["logprob.sequence"]).abs().max() < 1e-3 * e["logprob.sequence"].abs().max()


class published_vocabulary:
    """lm_head cut back to the rows of the checkpoint: the added tokens would take a share of the softmax."""

    def __init__(self, model, rows):
        self.head, self.rows = model.decoder.lm_head, rows

    def __enter__(self):
        self.whole = self.head.weight
        self.head.weight = torch.nn.Parameter(self.whole[:self.rows].detach().clone())

    def __exit__(self, *_):
        self.head.weight = self.whole


def test_losses_and_gradient_norms(model, e, v):
    """`--loss official`: mean over text plus mean over codes, backward through the same scoring function."""
    tokens, is_image = arrays(model, e["inter.input_ids"], e["inter.image_codes"])
    labels = e["inter.labels"]
    mask = (labels != -100) & ((torch.arange(labels.shape[-1]) == 0) | is_image[..., None])
    with published_vocabulary(model, e["inter.text_logits"].shape[-1]):
        loss, parts = warmup_loss(model.log_probs(tokens, is_image, mask), mask, is_image, "official")
        model.zero_grad()
        loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
    assert loss.item() == pytest.approx(e["inter.total_loss"].item(), abs=TOLERANCE)
    assert parts["loss/text"] == pytest.approx(e["inter.text_loss"].item(), abs=TOLERANCE)
    assert parts["loss/image"] == pytest.approx(e["inter.image_loss"].item(), abs=TOLERANCE)
    compared = 0
    for theirs, norm in v["grad.norms"].items():
        part, _, rest = theirs.partition(".")
        table = NAMES["vision_tower" if part in ("vision_tower", "rqtransformer") else part]
        ours = rename(rest, table) or rename(theirs, table)
        if ours.endswith("k_proj.bias"):
            continue                                          # zero in exact arithmetic: rounding noise
        got = grads[ours]
        if ours == "decoder.embed.weight":                    # without the rows of the tokens that we added
            got = got[:e["inter.text_logits"].shape[-1]]
        assert got.norm().item() == pytest.approx(norm, rel=1e-4), theirs
        compared += 1
    assert compared > 20
    close(grads["decoder.norm.weight"], e["grad.llm_final_norm"])
    close(grads["depth.position"], e["grad.rq_pos_emb_d"])
    close(grads["projector.0.bias"], e["grad.mm_projector_0_bias"])


@torch.no_grad()
def test_decode(model, e):
    codes = e["decode.codes"]
    features = model.vision.vectors(codes).sum(-2)
    close(features.view_as(e["decode.latent"]), e["decode.latent"])
    pixels = model.vision.decode(codes)
    close(pixels, e["decode.pixels_fp32"])
    close(((pixels + 1) * 127.5).clamp(0, 255), e["decode.pixels255_fp32"], tolerance=5e-3)
    decoder = model.vision.decoder
    small = e["decode.pixels_fp32_latent_resized"]
    decoder.latent_shape = tuple(s * decoder.grid // pixels.shape[-1] for s in small.shape[-2:])
    resized = model.vision.decode(codes)
    decoder.latent_shape = model.vision_config.decoder_latent_shape
    close(resized, small)
    half = copy.deepcopy(decoder).to(torch.bfloat16)(features.to(torch.bfloat16)).float()
    assert (half - e["decode.pixels_bf16"].float()).abs().mean() < 0.02


@torch.no_grad()
@pytest.mark.parametrize("scale", [3, 1])
def test_guided_greedy_codes(model, e, scale):
    codes, logits = e[f"gen.cfg{scale}.codes"], e[f"gen.cfg{scale}.logits"]
    rows = [pack([ids[mask.bool()].tolist()], model.vision_config.depth)
            for ids, mask in zip(e["gen.input_ids"], e["gen.attention_mask"])]
    prompts, empty = rows[:len(codes)], rows[len(codes)]
    assert torch.equal(model.unconditional_prompt().tokens, empty.tokens)
    drawn = model.generate(prompts, 1, codes.shape[1] + 1, Sampling(temperature=0, guidance=scale))
    for row, expected in zip(drawn, codes):
        assert torch.equal(row.tokens[row.is_image], expected)
    # Teacher-forced: both branches, every depth.
    for prompt, expected, guided in zip(prompts, codes, logits):
        row = prompt + Sequence(expected, torch.ones(len(expected), dtype=torch.bool))
        cond = model(row.tokens[None], row.is_image[None])[0, len(prompt) - 1:-1]
        vectors = model.vision.vectors(expected)
        c, u = model.depth(cond, vectors), model.depth(model.unconditional(expected), vectors)
        close(u + scale * (c - u), guided)
    pictures = model.vision.decode(codes)
    if f"gen.cfg{scale}.pixels_fp32" in e:
        close(pictures, e[f"gen.cfg{scale}.pixels_fp32"])
        close(((pictures[:1] + 1) * 127.5).clamp(0, 255), e["gen.entry_point.pixels255"], tolerance=5e-3)


def test_filtered_sampling(e, v):
    """VILA-U's own settings of image codes: temperature 1, top-k 900, then top-p 0.96."""
    chances = decision_logp(e["sampling.logits"], Sampling(**PUBLISHED), IMAGE).exp()
    close(chances, e["sampling.probs"])
    assert (chances > 0).sum(-1).tolist() == v["sampling.kept"]


@pytest.mark.parametrize("shape", ["landscape", "portrait"])
@pytest.mark.parametrize("mode", ["resize", "crop"])
def test_preprocessing(model, e, shape, mode):
    image = Image.open(FOLDER / ("test_image.png" if shape == "landscape" else "test_image_portrait.png"))
    got = preprocess(image, model.vision_config.image_size, crop=mode == "crop")
    assert torch.equal(got, e[f"preprocess.{shape}.{mode}"])


def test_prompts_and_their_ids(model, v):
    for key in ("prompt.text_question", "prompt.image_question"):
        asked = v[key]
        text = chat(("<image>\n" if "image" in key else "") + asked["question"], model.system_prompt)
        assert text == asked["prompt"] and model.text.encode_with_images(text) == asked["ids"]
    for asked in v["prompt.image_generation"]:
        assert model.prompt(asked["caption"], draw=True).tokens[:, 0].tolist() == asked["ids"]
    asked = v["prompt.unconditional"]
    assert chat(asked["caption"], model.system_prompt) + " " + IMAGE_START == asked["prompt"]
    assert model.unconditional_prompt().tokens[:, 0].tolist() == asked["ids"]
    assert chat(v["prompt.no_system_prompt"]["question"], "") == v["prompt.no_system_prompt"]["prompt"]
    assert model.text.encode(v["prompt.two_turns"]["prompt"]) == v["prompt.two_turns"]["ids"]


def test_text_tokens(model, v):
    for token, i in v["tokens.special"].items():
        assert model.text.id(token) == i
    for case in v["tokens.examples"]:
        assert model.text.encode(case["text"]) == case["ids"]
    for case in v["tokens.image_examples"]:
        assert model.text.encode_with_images(case["text"]) == case["ids"]
    assert model.decoder.embed.weight.shape[0] == v["tokens.vocab_size"] + 2          # <think>, </think>


@torch.no_grad()
def test_training_batch(model, e):
    """A batch whose labels the official code expanded itself."""
    depth, codes = model.vision_config.depth, iter(model.vision.encode(e["train.pixel_values"]))
    rows = []
    for ids in e["train.input_ids"].tolist():
        parts = [next(codes) if i == IMAGE_PLACEHOLDER else [i] for i in ids]
        rows.append(pack(parts, depth))
    length = e["train.labels_out"].shape[1]
    tokens = torch.stack([F.pad(r.tokens, (0, 0, 0, length))[:length] for r in rows])
    is_image = torch.stack([F.pad(r.is_image, (0, length))[:length] for r in rows])
    mask = (e["train.labels_out"] != -100) & ((torch.arange(depth) == 0) | is_image[..., None])
    with published_vocabulary(model, e["inter.text_logits"].shape[-1]):
        _, parts = warmup_loss(model.log_probs(tokens, is_image, mask), mask, is_image, "official")
    assert parts["loss/text"] == pytest.approx(e["train.text_loss"].item(), abs=TOLERANCE)
    assert parts["loss/image"] == pytest.approx(e["train.image_loss"].item(), abs=TOLERANCE)
