// Codes as bytes, and the dense words that hold them: shared by kernels.cpp and layout.cpp. Everything
// has internal linkage; numbers.h says why.
#pragma once

#include "numbers.h"

namespace {

// Codes as bytes, each `shift` above its integer.
template <class T>
void encode(const typename T::Stored *w, int count, const Grid &grid, uint32_t shift, uint8_t *code) {
  for (int i = 0; i < count; i++) {
    float x = T::read(w[i]) / grid.scale;
    x = x > grid.low ? x : grid.low;
    x = x < grid.high ? x : grid.high;
    code[i] = uint8_t(pattern(x + magic) + shift);
  }
}

// Eight codes of one byte each become `bits` bytes: neighbours are joined, then pairs, then fours.
template <int bits>
uint64_t squeeze(const uint8_t *code) {
  constexpr uint64_t one = (1u << bits) - 1, two = (1u << 2 * bits) - 1, four = (1ull << 4 * bits) - 1;
  uint64_t x;
  memcpy(&x, code, 8);
  x = (x & one * 0x0001000100010001) | (x >> (8 - bits) & (one << bits) * 0x0001000100010001);
  x = (x & two * 0x0000000100000001) | (x >> (16 - 2 * bits) & (two << 2 * bits) * 0x0000000100000001);
  return (x & four) | (x >> (32 - 4 * bits) & four << 4 * bits);
}

// The way back.
template <int bits>
uint64_t spread(uint64_t x) {
  constexpr uint64_t one = (1u << bits) - 1, two = (1u << 2 * bits) - 1, four = (1ull << 4 * bits) - 1;
  x = (x & four) | (x & four << 4 * bits) << (32 - 4 * bits);
  x = (x & two * 0x0000000100000001) | (x & (two << 2 * bits) * 0x0000000100000001) << (16 - 2 * bits);
  return (x & one * 0x0001000100010001) | (x & (one << bits) * 0x0001000100010001) << (8 - bits);
}

// `count` is a multiple of eight.
template <int bits>
void pack_octets(const uint8_t *code, int count, uint8_t *out) {
  for (int i = 0; i < count / 8; i++) {
    const uint64_t x = squeeze<bits>(code + 8 * i);
    memcpy(out + bits * i, &x, bits);
  }
}

template <int bits>
void unpack_octets(const uint8_t *in, int count, uint8_t *code) {
  for (int i = 0; i < count / 8; i++) {
    uint64_t x = 0;
    memcpy(&x, in + bits * i, bits);
    x = spread<bits>(x);
    memcpy(code + 8 * i, &x, 8);
  }
}

typedef void Octets(const uint8_t *in, int count, uint8_t *out);
constexpr Octets *packers[] = {pack_octets<2>, pack_octets<3>, pack_octets<4>, pack_octets<5>,
                               pack_octets<6>, pack_octets<7>, pack_octets<8>};
constexpr Octets *unpackers[] = {unpack_octets<2>, unpack_octets<3>, unpack_octets<4>, unpack_octets<5>,
                                 unpack_octets<6>, unpack_octets<7>, unpack_octets<8>};
constexpr int chunk = 256;

// A row takes whole words, but its last octet may have fewer than `bits` bytes of them.
inline int64_t bytes_of_row(int64_t columns, int bits) { return (columns * bits + 31) / 32 * 4; }

// Packs `count` codes into `out`, which has `room` bytes. make(first, count, code) writes codes as
// bytes that start at 0; only the last octet of a row is not whole.
template <class Make>
void pack_codes(int64_t count, int bits, uint8_t *out, int64_t room, const Make &make) {
  alignas(64) uint8_t code[chunk];
  Octets *const packer = packers[bits - 2];
  const int64_t whole = count & ~int64_t(7);
  for (int64_t i = 0; i < whole; i += chunk) {
    const int size = int(whole - i < chunk ? whole - i : chunk);
    make(i, size, code);
    packer(code, size, out + i / 8 * bits);
  }
  if (count == whole) return;
  uint8_t last[8] = {};
  memset(code, 0, 8);
  make(whole, int(count - whole), code);
  packer(code, 8, last);
  const int64_t left = room - whole / 8 * bits;
  memcpy(out + whole / 8 * bits, last, size_t(left < bits ? left : bits));
}

// Unpacks them again: take(first, count, code) is given codes as bytes that start at 0.
template <class Take>
void unpack_codes(int64_t count, int bits, const uint8_t *in, int64_t room, const Take &take) {
  alignas(64) uint8_t code[chunk];
  Octets *const unpacker = unpackers[bits - 2];
  const int64_t whole = count & ~int64_t(7);
  for (int64_t i = 0; i < whole; i += chunk) {
    const int size = int(whole - i < chunk ? whole - i : chunk);
    unpacker(in + i / 8 * bits, size, code);
    take(i, size, code);
  }
  if (count == whole) return;
  uint8_t last[8] = {};
  const int64_t left = room - whole / 8 * bits;
  memcpy(last, in + whole / 8 * bits, size_t(left < bits ? left : bits));
  unpacker(last, 8, code);
  take(whole, int(count - whole), code);
}

}  // namespace
