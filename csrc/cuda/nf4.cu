// Decoding with W in 4 bits, NF4 as bitsandbytes lays it out: W [N, K] flattened, two elements a byte, the first in its high
// half; a scale in fp32 for every 64 elements or more.
//
// A byte is looked up as a pair of elements: in shared memory each lane has a table of its own, in the bank that is its own.
// That is a shift, one LOP3 and one load for two elements. Scales are applied to sums over 64 elements of K, in fp32.
#include "decode.h"

namespace {

constexpr int kScaled = 64;  // of K, that a warp takes at once: elements that share a scale

CONSTANT float kNormalFloat[16] = {
    -1.0f,         -0.6961928f,  -0.52507305f, -0.39491749f, -0.28444138f, -0.18477343f, -0.09105004f, 0.0f,
    0.0795803f,    0.1609302f,   0.2461123f,   0.33791524f,  0.44070983f,  0.562617f,    0.72295684f,  1.0f,
};

struct NormalFloat4 {
  static constexpr bool kAligned = true;

  template <int kHalves>
  struct Memory : Shared<kHalves> {
    alignas(128) uint32_t pairs[256][32];  // of a byte, for a lane
  };

  template <int kHalves>
  struct Stage {  // of a warp
    Chunk w[kColumns * 2];
    Chunk x[kHalves * 2][32];
    float scales[kColumns];
  };

  // As `stream`. Lane (g, t) multiplies the 16 elements at 16t of the rows g, g + 8, ... of W; those of x it has loaded itself.
  template <class T, int kHalves>
  static DEVICE void multiply(float (&sums)[kColumns / 16][kHalves][4], const LoraDecode& p, const Columns& at, int part,
                              Memory<kHalves>& shared) {
    static_assert(kWarps * kGemmStages * sizeof(Stage<kHalves>) <= sizeof(shared.ring), "");
    const int lane = thread() % 32, warp = thread() / 32, g = lane / 4, t = lane % 4;
    for (int i = warp; i < 256; i += kWarps) shared.pairs[i][lane] = pack<T>(kNormalFloat[i / 16], kNormalFloat[i % 16]);
    barrier();

    constexpr int kTurn = kScaled * kWarps;
    const int turns = static_cast<int>((p.k + kTurn - 1) / kTurn), first = turns * part / p.parts;
    const int count = turns * (part + 1) / p.parts - first;
    const int64_t k = int64_t{first} * kTurn + warp * kScaled;
    const char* packed = static_cast<const char*>(p.w) + ((at.in_y + lane / 2) * p.k + k) / 2 + lane % 2 * 16;
    const T* x = static_cast<const T*>(p.x) + g * p.stride_x + k + 16 * t;
    int64_t scaled = (at.in_y + lane) * p.k + k;  // an element of W whose scale this lane loads
    int64_t left = p.k - k;
    Stage<kHalves>* ring = reinterpret_cast<Stage<kHalves>*>(shared.ring) + warp * kGemmStages;

    int filled = 0, slot = 0;
    auto fetch = [&] {
      if (filled++ < count) {
        Stage<kHalves>& to = ring[slot];
        const int w_rows = left > 0 ? at.live : 0, x_rows = left > 0 ? static_cast<int>(p.rows) : 0;
        for (int i = 0; i < 4; ++i)
          copy_async(&to.w[32 * i + lane], packed + 8 * i * p.k, 16 * i + lane / 2 < w_rows);
        for (int i = 0; i < 2 * kHalves; ++i)
          copy_async(&to.x[i][lane], x + i / 2 * 8 * p.stride_x + i % 2 * 8, i / 2 * 8 + g < x_rows);
        for (int i = 0; i < 2; ++i)
          copy_async(&to.scales[32 * i + lane], p.absmax + ((scaled + 32 * i * p.k) >> p.block_shift), 32 * i + lane < w_rows);
        packed += kTurn / 2;
        x += kTurn;
        scaled += kTurn;
        left -= kTurn;
        slot = slot + 1 < kGemmStages ? slot + 1 : 0;
      }
      copy_commit();
    };
#pragma unroll 1
    for (int i = 0; i < kGemmStages - 1; ++i) fetch();
#pragma unroll 1
    for (int i = 0, here = 0; i < count; ++i, here = here + 1 < kGemmStages ? here + 1 : 0) {
      copy_wait<kGemmStages - 2>();
      warp_barrier();  // this stage is there for all lanes, and the one before it has been read
      fetch();
      const Stage<kHalves>& stage = ring[here];
      Chunk rows[kHalves][2];
      for (int i = 0; i < 2 * kHalves; ++i) rows[i / 2][i % 2] = stage.x[i][lane];
      const uint32_t* lane_w = stage.w[2 * g + t / 2].word + t % 2 * 2;
      for (int i = 0; i < kColumns / 16; ++i) {
        const uint32_t* top = lane_w + 16 * i * 8;
        float block[kHalves][4] = {};
        for (int quarter = 0; quarter < 4; ++quarter) {  // 4 elements of the lane, 2 bytes: the first of a word, or the last
          const uint32_t words[2] = {top[quarter / 2], top[8 * 8 + quarter / 2]};
          auto pair = [&](int row, int byte) {
            const int bit = quarter % 2 * 16 + byte * 8;
            const uint32_t offset = (bit ? words[row] >> (bit - 7) : words[row] << 7) & 0x7f80u;
            return *reinterpret_cast<const uint32_t*>(reinterpret_cast<const char*>(shared.pairs) + (offset | lane * 4));
          };
          const uint32_t a[4] = {pair(0, 0), pair(1, 0), pair(0, 1), pair(1, 1)};
          for (int j = 0; j < kHalves; ++j) {
            const uint32_t* two = &rows[j][quarter / 2].word[quarter % 2 * 2];
            const uint32_t b[2] = {two[0], two[1]};
            mma<T>(block[j], a, b);
          }
        }
        for (int j = 0; j < kHalves; ++j)
          for (int c = 0; c < 4; ++c) sums[i][j][c] += block[j][c] * stage.scales[16 * i + g + c / 2 * 8];
      }
    }
    copy_wait<0>();
  }
};

}  // namespace

EXPORT const char* lora_cuda_decode_nf4(const LoraDecode* p, void* stream) {
  return launch_decode<NormalFloat4>(*p, stream);
}
