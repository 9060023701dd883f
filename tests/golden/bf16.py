"""How far PyTorch's own bf16 is from the golden logits: runs every model with weights and arithmetic in bf16 (CPU, eager attention).

    pip install torch "transformers<5" safetensors numpy
    python bf16.py > bf16.txt         # NAME LARGEST-DIFFERENCE MEAN-DIFFERENCE

With experts the golden's router logits decide who is chosen; the weights are the run's own.
"""
import os
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

root = os.path.dirname(os.path.abspath(__file__))

def choose(chosen):
    """Makes a router choose the experts `chosen` [tokens, k]: the others' logits go below the least of theirs where they are not."""
    def hook(gate, inputs, logits):
        keep = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, chosen, True)
        least = logits.masked_fill(~keep, float("inf")).min(-1, keepdim=True).values
        return torch.where(keep, logits, torch.minimum(logits, least - 0.01 * least.abs() - 0.01))
    return hook

for name in sorted(d for d in os.listdir(root) if os.path.isdir(os.path.join(root, d))):
    folder = os.path.join(root, name)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager").eval()
    golden = load_file(os.path.join(folder, "expected.safetensors"))
    gates = [m.gate for m in model.modules() if hasattr(m, "gate") and hasattr(m, "experts")]
    for i, gate in enumerate(gates):
        gate.register_forward_hook(choose(golden[f"router.{i}"].topk(model.config.num_experts_per_tok, dim=-1).indices))
    with torch.no_grad():
        logits = model(input_ids=golden["input_ids"], use_cache=False).logits.float()
    difference = (logits - golden["logits"]).abs()
    print(f"{name} {difference.max().item():.4f} {difference.mean().item():.5f}", flush=True)
