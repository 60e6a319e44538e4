// Any machine: eight lanes that the compiler vectorizes as it can.
#define ISA generic
#include "scalar.h"

namespace {

constexpr int kLanes = 8;
struct Vec { float lane[kLanes]; };

#define EACH_LANE for (int i = 0; i < kLanes; ++i)

inline Vec broadcast(float value) { Vec v; EACH_LANE v.lane[i] = value; return v; }
inline Vec add(Vec a, Vec b) { EACH_LANE a.lane[i] += b.lane[i]; return a; }
inline Vec fma(Vec a, Vec b, Vec c) { EACH_LANE c.lane[i] += a.lane[i] * b.lane[i]; return c; }
inline float sum(Vec v) {
  const float* l = v.lane;
  return ((l[0] + l[4]) + (l[2] + l[6])) + ((l[1] + l[5]) + (l[3] + l[7]));
}
template <class T>
inline Vec load(const T* from) { Vec v; EACH_LANE v.lane[i] = widen(from[i]); return v; }
template <class T>
inline void store(T* to, Vec v) { EACH_LANE narrow(v.lane[i], to[i]); }

}  // namespace

#include "parts.h"
#include "dot.h"
#include "batched.h"
