"""One LoRA step by PyTorch in fp32 on the CPU, same shapes as `lorad bench train`: what people would run.

    bench_train_torch.py L D H G HD F V TOKENS THREADS

A Llama with random frozen weights, LoRA of rank 16 on every linear layer, scaled dot product attention
written out, AdamW.  Prints the median seconds of a step and the peak memory of the first MEMORY_STEPS
steps in bytes.
"""
import resource
import statistics
import sys
import time

import torch
import torch.nn.functional as F

L, D, H, G, HD, FF, V, T, THREADS = map(int, sys.argv[1:10])
R = 16
WARM_UP, TIMED = 1, 3
MEMORY_STEPS = 2  # as in server/bench_train.c
torch.set_num_threads(THREADS)
torch.manual_seed(1)


class Linear(torch.nn.Module):
    def __init__(self, n_in, n_out):
        super().__init__()
        self.w = torch.empty(n_out, n_in).normal_(0, n_in ** -0.5)
        self.a = torch.nn.Parameter(torch.empty(R, n_in).uniform_(-n_in ** -0.5, n_in ** -0.5))
        self.b = torch.nn.Parameter(torch.zeros(n_out, R))

    def forward(self, x):
        return F.linear(x, self.w) + 2.0 * F.linear(F.linear(x, self.a), self.b)


def norm(x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)


def rope(x, cos, sin):
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = Linear(D, H * HD), Linear(D, G * HD), Linear(D, G * HD)
        self.o = Linear(H * HD, D)
        self.gate, self.up, self.down = Linear(D, FF), Linear(D, FF), Linear(FF, D)

    def forward(self, x, cos, sin, mask):
        h = norm(x)
        q = rope(self.q(h).view(T, H, HD).transpose(0, 1), cos, sin)
        k = rope(self.k(h).view(T, G, HD).transpose(0, 1), cos, sin).repeat_interleave(H // G, 0)
        v = self.v(h).view(T, G, HD).transpose(0, 1).repeat_interleave(H // G, 0)
        p = torch.softmax(q @ k.transpose(1, 2) * HD ** -0.5 + mask, -1)
        x = x + self.o((p @ v).transpose(0, 1).reshape(T, H * HD))
        h = norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


embed = torch.empty(V, D).normal_()
head = torch.empty(V, D).normal_(0, D ** -0.5)
blocks = [Block() for _ in range(L)]
opt = torch.optim.AdamW([p for b in blocks for p in b.parameters()], lr=2e-4, weight_decay=0)
ids = torch.arange(T) * 2654435761 % (2 ** 32) % V
angles = torch.arange(T)[:, None] * 10000.0 ** (-torch.arange(0, HD, 2) / HD)
cos, sin = angles.cos(), angles.sin()
mask = torch.full((T, T), float("-inf")).triu(1)
seconds = []
for i in range(WARM_UP + TIMED):
    began = time.monotonic()
    x = embed[ids]
    for b in blocks:
        x = b(x, cos, sin, mask)
    loss = F.cross_entropy(F.linear(norm(x), head)[:-1], ids[1:])
    opt.zero_grad()
    loss.backward()
    opt.step()
    seconds.append(time.monotonic() - began)
    if i + 1 == MEMORY_STEPS:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
print(statistics.median(seconds[WARM_UP:]), peak)
