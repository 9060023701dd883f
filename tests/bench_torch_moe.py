#!/usr/bin/env python3
"""PyTorch on the CPU as a peer of bench_moe: softmax + topk + sort of the same sizes, one thread.

bench_torch_moe.py: prints "ready VERSION" and then, for each line "route T E K" on stdin, the seconds of one pass over [T, E] f32 logits: softmax, top-k,
division by the sum, and a stable sort of the T * K expert ids (what a permutation of tokens by expert begins with)."""
import sys
import time

import torch


def route(logits, k):
    weights, ids = torch.topk(torch.softmax(logits, -1), k, -1)
    weights = weights / weights.sum(-1, keepdim=True)
    return weights, ids, torch.sort(ids.view(-1), stable=True)


def main():
    torch.set_num_threads(1)
    torch.manual_seed(1)
    logits = {}
    with torch.inference_mode():
        print(f"ready {torch.__version__}", flush=True)
        for line in iter(sys.stdin.readline, ""):
            what, t, e, k = line.split()
            size = int(t), int(e)
            if size not in logits:
                logits[size] = torch.randn(size)
                route(logits[size], int(k))
            start = time.perf_counter()
            route(logits[size], int(k))
            print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
