"""Greedy generation with a Llama, natively and under the mode: the same tokens, and what ran.

    python examples/generate.py                      # a small Llama with random weights
    python examples/generate.py --model PATH         # a model that is on this disk

Every new token is a call with new sizes. Plans for new sizes are made from prepared parts; nothing is compiled anew.
"""

from __future__ import annotations

import argparse
import time

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from gemsmode import GemsMode


def load(path: str | None) -> torch.nn.Module:
    if path is not None:
        return AutoModelForCausalLM.from_pretrained(path, local_files_only=True)
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                                        num_key_value_heads=1, max_position_embeddings=256, bos_token_id=1, eos_token_id=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="a folder with a model of transformers")
    parser.add_argument("--tokens", type=int, default=6, help="how many to generate")
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load(options.model).to(device).eval()
    prompt = torch.tensor([[1, 72, 101, 108, 108, 111]], device=device)

    def generate() -> torch.Tensor:
        return model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=options.tokens, min_new_tokens=options.tokens,
                              do_sample=False, pad_token_id=0)

    native = generate()
    with GemsMode():
        first = time.perf_counter()
        replaced = generate()
        print(f"{options.tokens} tokens under the mode in {time.perf_counter() - first:.2f} s: {replaced[0, prompt.shape[1]:].tolist()}")
    print("the same tokens as without it" if torch.equal(native, replaced) else f"other tokens than without it: {native}")

    with GemsMode(trace=True) as gems:
        model(prompt)
    print(gems.report)


if __name__ == "__main__":
    main()
