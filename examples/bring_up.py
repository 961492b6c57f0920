"""A new model on a new accelerator: what does it call, what is covered, and what is to be written next?

    python examples/bring_up.py                                   # a Qwen2 of 0.5 billion parameters
    python examples/bring_up.py --target hip:gfx942 --layers 2
    python examples/bring_up.py --config PATH                     # a folder with a model's config.json

A training step of the model on the meta device: no GPU, no weights, no kernel is run; every call is decided as it would
be on the target. Writes ``bring_up.html``, one page with the treemap and the tables, and prints what is missing.
"""

from __future__ import annotations

import argparse
import sys

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config

from gemsmode import GemsMode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", help="a folder with the model's config.json")
    parser.add_argument("--target", default="cuda:90", help="what to plan for: cuda:90 is an H200, hip:gfx942 an MI300X")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--html", default="bring_up.html", help="where to write the page (default: %(default)s)")
    options = parser.parse_args()

    config = AutoConfig.from_pretrained(options.config, local_files_only=True) if options.config else Qwen2Config(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=options.layers, num_attention_heads=14, num_key_value_heads=2)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
        tokens = torch.zeros(1, options.length, dtype=torch.long)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)

    with GemsMode(dry_run=options.target) as gems:
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()

    report = gems.report
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{type(model).__name__}, {parameters / 1e9:.2f} billion parameters, 1 x {options.length} tokens, a training step")
    print(f"coverage on {options.target}: {report.coverage.calls:.1%} of calls, {report.coverage.bytes:.1%} of bytes; "
          f"tensors at their peak: {report.environment['peak_bytes'] / 1e9:.1f} GB")
    print("to write next, by the bytes of their arguments:")
    for row in report.rows("overload", ["pass", "error"]):
        print(f"  {row.label[0]}: {row.calls} calls, {row.touched / 1e6:.1f} MB, {', '.join(row.dtypes)}; {row.label[3]}")
        for shape in row.usual_shapes[:3]:
            print(f"      {shape}")
    report.to_html(options.html)
    print(f"wrote {options.html}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
