// The steps of a dot product: operands are widened to fp32, one vector at a time.
namespace {

template <class T>
struct Dot {
  static constexpr int kStep = kLanes;
  using Operand = Vec;
  static Operand load(const T* from) { return ::load(from); }
  static Operand load_part(const T* from, int64_t count) { return ::load_part(from, count); }
  static Vec accumulate(Operand a, Operand b, Vec c) { return fma(a, b, c); }
};

}  // namespace
