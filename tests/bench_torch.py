#!/usr/bin/env python3
"""PyTorch on the CPU as a peer of bench_decode: the decode step of the same synthetic Llama, as plain matrix products.

bench_torch.py THREADS CONTEXT: prints "ready VERSION, ..." and then, for each line "f32 N" or "bf16 N" on stdin, decodes N tokens after
CONTEXT cached ones and prints the seconds that it took. bench_decode starts it and asks in the same rounds in which it measures llmpar."""
import sys
import time

import torch
import torch.nn.functional as F

HIDDEN, LAYERS, HEADS, KV, FFN, VOCABULARY = 1024, 16, 16, 4, 4096, 32000
D = HIDDEN // HEADS


def matrix(rows, columns, dtype):
    return (torch.rand(rows, columns) - 0.5).mul_(3.46 / columns ** 0.5).to(dtype)


class Llama:
    def __init__(self, dtype, context):
        self.dtype, self.context = dtype, context
        self.layers = [dict(q=matrix(HIDDEN, HIDDEN, dtype), k=matrix(KV * D, HIDDEN, dtype), v=matrix(KV * D, HIDDEN, dtype),
                            o=matrix(HIDDEN, HIDDEN, dtype), gate=matrix(FFN, HIDDEN, dtype), up=matrix(FFN, HIDDEN, dtype),
                            down=matrix(HIDDEN, FFN, dtype), norm=torch.ones(2, HIDDEN, dtype=dtype)) for _ in range(LAYERS)]
        self.embed, self.head = matrix(VOCABULARY, HIDDEN, dtype), matrix(VOCABULARY, HIDDEN, dtype)
        self.norm = torch.ones(HIDDEN, dtype=dtype)
        self.keys   = torch.randn(LAYERS, KV, context + 1024, D).to(dtype)
        self.values = torch.randn(LAYERS, KV, context + 1024, D).to(dtype)
        self.frequencies = 10000.0 ** (-torch.arange(D // 2) * 2.0 / D)

    def rms(self, x, weight):
        return x * torch.rsqrt(x.float().pow(2).mean() + 1e-5).to(self.dtype) * weight

    def rope(self, x, cos, sin):
        a, b = x.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    def step(self, token, position):
        x = self.embed[token:token + 1]
        angle = position * self.frequencies
        cos, sin = angle.cos().to(self.dtype), angle.sin().to(self.dtype)
        for i, w in enumerate(self.layers):
            h = self.rms(x, w["norm"][0])
            q = self.rope(F.linear(h, w["q"]).view(KV, HEADS // KV, D), cos, sin)
            self.keys[i, :, position] = self.rope(F.linear(h, w["k"]).view(KV, D), cos, sin)
            self.values[i, :, position] = F.linear(h, w["v"]).view(KV, D)
            keys, values = self.keys[i, :, :position + 1], self.values[i, :, :position + 1]
            scores = torch.matmul(q, keys.transpose(1, 2)) / D ** 0.5
            x = x + F.linear(torch.matmul(torch.softmax(scores, -1), values).reshape(1, HIDDEN), w["o"])
            h = self.rms(x, w["norm"][1])
            x = x + F.linear(F.silu(F.linear(h, w["gate"])) * F.linear(h, w["up"]), w["down"])
        return int(F.linear(self.rms(x, self.norm), self.head).argmax())


def main():
    threads, context = int(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(threads)
    torch.manual_seed(1)
    with torch.inference_mode():
        models = {"f32": Llama(torch.float32, context), "bf16": Llama(torch.bfloat16, context)}
        for model in models.values():
            model.step(1, context)
        print(f"ready {torch.__version__}, {threads} threads", flush=True)
        for line in iter(sys.stdin.readline, ""):
            name, n = line.split()
            token, start = 1, time.perf_counter()
            for t in range(int(n)):
                token = models[name].step(token, context + t)
            print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
