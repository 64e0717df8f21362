#!/usr/bin/env python3
"""Makes gguf_blocks.json: random blocks of every GGUF type and the numbers they stand for.

Written from the description of the formats, element after element in the order in which their
encoder walks (halves, then shifts, then bytes), which is not how engine/gguf_blocks.c indexes them.
Every product and sum is rounded to fp32.  Usage: python3 gguf_blocks.py > gguf_blocks.json
"""
import json
import struct

state = 12345


def rnd():
    global state
    state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
    return state >> 33


def raw(n):
    return bytes(rnd() & 255 for _ in range(n))


def scale():  # an fp16 of ordinary size
    return struct.pack("<e", (rnd() % 2001 - 1000) / 4096)


def f(x):  # round to fp32
    return struct.unpack("<f", struct.pack("<f", x))[0]


def h(b):
    return struct.unpack("<e", b)[0]


def low_high(q):
    return [x & 15 for x in q] + [x >> 4 for x in q]


NL = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]


def q4_0():
    d, q = scale(), raw(16)
    return d + q, [f(h(d) * (c - 8)) for c in low_high(q)]


def q4_1():
    d, m, q = scale(), scale(), raw(16)
    return d + m + q, [f(f(h(d) * c) + h(m)) for c in low_high(q)]


def fifth(bits, codes):
    word = int.from_bytes(bits, "little")
    return [c + 16 * (word >> i & 1) for i, c in enumerate(codes)]


def q5_0():
    d, bits, q = scale(), raw(4), raw(16)
    return d + bits + q, [f(h(d) * (c - 16)) for c in fifth(bits, low_high(q))]


def q5_1():
    d, m, bits, q = scale(), scale(), raw(4), raw(16)
    return d + m + bits + q, [f(f(h(d) * c) + h(m)) for c in fifth(bits, low_high(q))]


def q8_0():
    d, q = scale(), raw(32)
    return d + q, [f(h(d) * c) for c in struct.unpack("32b", q)]


def iq4_nl():
    d, q = scale(), raw(16)
    return d + q, [f(h(d) * NL[c]) for c in low_high(q)]


def q2_k():
    sc, qs, d, dmin = raw(16), raw(64), scale(), scale()
    out, it = [], iter(sc)
    for half in (qs[:32], qs[32:]):
        for shift in (0, 2, 4, 6):
            for part in (half[:16], half[16:]):
                s = next(it)
                dl, ml = f(h(d) * (s & 15)), f(h(dmin) * (s >> 4))
                out += [f(f(dl * (x >> shift & 3)) - ml) for x in part]
    return sc + qs + d + dmin, out


def q3_k():
    mask, qs, sc, d = raw(32), raw(64), raw(12), scale()
    scales = [0] * 16
    for i in range(4):  # byte i, 4 + i and 8 + i share four scales
        a, b, c = sc[i], sc[4 + i], sc[8 + i]
        scales[i] = (a & 15) + 16 * (c & 3)
        scales[4 + i] = (b & 15) + 16 * (c >> 2 & 3)
        scales[8 + i] = (a >> 4) + 16 * (c >> 4 & 3)
        scales[12 + i] = (b >> 4) + 16 * (c >> 6)
    out, it, bit = [], iter(scales), 1
    for half in (qs[:32], qs[32:]):
        for shift in (0, 2, 4, 6):
            for first in (0, 16):
                dl = f(h(d) * (next(it) - 32))
                for i in range(first, first + 16):
                    code = (half[i] >> shift & 3) - (0 if mask[i] & bit else 4)
                    out.append(f(dl * code))
            bit <<= 1
    return mask + qs + sc + d, out


def six_bits(sc):
    scales = [x & 63 for x in sc[0:4]] + [(sc[8 + i] & 15) + 16 * (sc[i] >> 6) for i in range(4)]
    mins = [x & 63 for x in sc[4:8]] + [(sc[8 + i] >> 4) + 16 * (sc[4 + i] >> 6) for i in range(4)]
    return scales, mins


def k_block(d, dmin, sc, codes):
    scales, mins = six_bits(sc)
    out = []
    for j in range(8):
        dl, ml = f(h(d) * scales[j]), f(h(dmin) * mins[j])
        out += [f(f(dl * c) - ml) for c in codes[32 * j : 32 * j + 32]]
    return out


def chunks(q):
    out = []
    for at in range(0, 128, 32):
        out += low_high(q[at : at + 32])
    return out


def q4_k():
    d, dmin, sc, q = scale(), scale(), raw(12), raw(128)
    return d + dmin + sc + q, k_block(d, dmin, sc, chunks(q))


def q5_k():
    d, dmin, sc, high, q = scale(), scale(), raw(12), raw(32), raw(128)
    codes, bits = chunks(q), []
    for bit in range(8):
        bits += [x >> bit & 1 for x in high]
    return d + dmin + sc + high + q, k_block(d, dmin, sc, [c + 16 * b for c, b in zip(codes, bits)])


def q6_k():
    low, high, sc, d = raw(128), raw(64), raw(16), scale()
    codes = []
    for n in (0, 1):
        l, u = low[64 * n : 64 * n + 64], high[32 * n : 32 * n + 32]
        codes += [(l[i] & 15) + 16 * (u[i] & 3) for i in range(32)]
        codes += [(l[32 + i] & 15) + 16 * (u[i] >> 2 & 3) for i in range(32)]
        codes += [(l[i] >> 4) + 16 * (u[i] >> 4 & 3) for i in range(32)]
        codes += [(l[32 + i] >> 4) + 16 * (u[i] >> 6) for i in range(32)]
    signed = struct.unpack("16b", sc)
    return low + high + sc + d, [f(f(h(d) * signed[i // 16]) * (c - 32)) for i, c in enumerate(codes)]


def iq4_xs():
    d, high, low, q = scale(), raw(2), raw(4), raw(128)
    word, out = int.from_bytes(high, "little"), []
    nibbles = [n for x in low for n in (x & 15, x >> 4)]
    for j in range(8):
        dl = f(h(d) * (nibbles[j] + 16 * (word & 3) - 32))
        word >>= 2
        out += [f(dl * NL[c]) for c in low_high(q[16 * j : 16 * j + 16])]
    return d + high + low + q, out


types = {
    2: q4_0, 3: q4_1, 6: q5_0, 7: q5_1, 8: q8_0, 10: q2_k, 11: q3_k, 12: q4_k, 13: q5_k, 14: q6_k,
    20: iq4_nl, 23: iq4_xs,
}
rows = []
for number, make in types.items():
    for _ in range(2):
        block, values = make()
        row = {"type": number, "name": make.__name__.upper(), "block": block.hex(),
               "bits": struct.pack("<%df" % len(values), *[v + 0.0 for v in values]).hex()}
        rows.append(json.dumps(row))
print("[\n" + ",\n".join(rows) + "\n]")
