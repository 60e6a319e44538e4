// Loads and stores of the first `count` lanes, where the instruction set has no masks for them.
namespace {

template <class T>
inline Vec load_part(const T* from, int64_t count) {
  T all[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) all[i] = from[i];
  return load(all);
}
template <class T>
inline void store_part(T* to, Vec v, int64_t count) {
  T all[kLanes];
  store(all, v);
  for (int64_t i = 0; i < count; ++i) to[i] = all[i];
}

}  // namespace
