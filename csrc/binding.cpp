// The operators that Python calls, by torch's stable ABI, and the choice of an instruction set at run time.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cpu/isa.h"
#include "cpu/scratch.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;

namespace {

struct Isa {
  const char* name;
  bool (*supported)();
  void (*batched)(const LoraBatch&);
  bool (*forward)(const LoraLinear&);
  bool (*backward)(const LoraLinear&);
  void (*dequantize)(const LoraDequantize&);  // null: that of the next
};

const Isa kIsas[] = {  // the best first
#if defined(__x86_64__)
    {"amx", amx::supported, amx::batched, amx::forward, amx::backward, nullptr},
    {"avx512_bf16", avx512_bf16::supported, avx512_bf16::batched, avx512_bf16::forward, avx512_bf16::backward,
     nullptr},  // its rounding flushes subnormals
    {"avx512", avx512::supported, avx512::batched, avx512::forward, avx512::backward, avx512::dequantize},
    {"avx2", avx2::supported, avx2::batched, avx2::forward, avx2::backward, avx2::dequantize},
#endif
    {"generic", [] { return true; }, generic::batched, generic::forward, generic::backward,
     generic::dequantize},
};
constexpr int kCount = sizeof kIsas / sizeof *kIsas;

int32_t dtype_of(ScalarType dtype) {
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                  "dtype: got ", dtype, ", expected float, bfloat16 or half");
  return dtype == ScalarType::Float ? LORA_FP32 : dtype == ScalarType::BFloat16 ? LORA_BF16 : LORA_FP16;
}

template <typename T = void>
const T* pointer(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T = void>
const T* pointer(const MaybeTensor& tensor) {
  return tensor ? pointer<T>(*tensor) : nullptr;
}

// torch::stable::new_empty takes a microsecond more, to find the operator by its name.
Tensor new_matrix(int64_t rows, int64_t columns, int32_t dtype) {
  const int64_t sizes[] = {rows, columns}, strides[] = {columns, 1};
  const int32_t dtypes[] = {aoti_torch_dtype_float32(), aoti_torch_dtype_bfloat16(), aoti_torch_dtype_float16()};
  const int32_t cpu = aoti_torch_device_type_cpu();
  AtenTensorHandle made;
  const bool done = aoti_torch_empty_strided(2, sizes, strides, dtypes[dtype], cpu, -1, &made) == AOTI_TORCH_SUCCESS;
  STD_TORCH_CHECK(done, "lora_linear: no memory for a result of ", rows, " x ", columns);
  return Tensor(made);
}

int64_t row_stride(const MaybeTensor& tensor) { return tensor ? tensor->stride(0) : 0; }

// What forward and backward have in common; x may be dy there.
LoraLinear linear(const Tensor& x, const MaybeTensor& w, const Tensor& a, const Tensor& b, double scaling,
                  const MaybeTensor& seed, int64_t keep_threshold, double keep_scale, int64_t threads) {
  LoraLinear call = {};
  call.w = pointer(w), call.a = pointer(a), call.b = pointer(b);
  call.m = x.size(0), call.n = b.size(0), call.k = a.size(1), call.r = a.size(0);
  call.stride_w = row_stride(w), call.stride_a = a.stride(0), call.stride_b = b.stride(0);
  call.seed = pointer<int64_t>(seed), call.keep_threshold = keep_threshold, call.keep_scale = keep_scale;
  call.scaling = scaling, call.dtype = dtype_of(x.scalar_type()), call.threads = threads;
  return call;
}

void check_memory(bool done, const LoraLinear& call) {
  STD_TORCH_CHECK(done, "lora_linear: no memory for packed operands: m = ", call.m, ", n = ", call.n, ", r = ", call.r);
}

std::tuple<Tensor, Tensor> forward(const Tensor& x, const MaybeTensor& w, const MaybeTensor& bias, const Tensor& a,
                                   const Tensor& b, double scaling, const MaybeTensor& seed, int64_t keep_threshold,
                                   double keep_scale, int64_t threads, int64_t isa) {
  LoraLinear call = linear(x, w, a, b, scaling, seed, keep_threshold, keep_scale, threads);
  const Tensor y = new_matrix(call.m, call.n, call.dtype), h = new_matrix(call.m, call.r, call.dtype);
  call.x = pointer(x), call.stride_x = x.stride(0), call.bias = pointer(bias);
  call.y = y.mutable_data_ptr(), call.h = h.mutable_data_ptr();
  check_memory(kIsas[isa].forward(call), call);
  return {y, h};
}

// x is there if dA is needed, and h if dB is.
std::tuple<MaybeTensor, MaybeTensor, MaybeTensor> backward(
    const Tensor& dy, const MaybeTensor& x, const MaybeTensor& h, const MaybeTensor& w, const Tensor& a, const Tensor& b,
    double scaling, const MaybeTensor& seed, int64_t keep_threshold, double keep_scale, bool needs_x,
    ScalarType gradient_dtype, int64_t threads, int64_t isa) {
  LoraLinear call = linear(dy, w, a, b, scaling, seed, keep_threshold, keep_scale, threads);
  call.dy = pointer(dy), call.stride_dy = dy.stride(0), call.x = pointer(x), call.stride_x = row_stride(x);
  call.h = const_cast<void*>(pointer(h)), call.gradient_dtype = dtype_of(gradient_dtype);
  MaybeTensor dx, da, db;
  if (needs_x) dx = new_matrix(call.m, call.k, call.dtype), call.dx = dx->mutable_data_ptr();
  if (x) da = new_matrix(call.r, call.k, call.gradient_dtype), call.da = da->mutable_data_ptr();
  if (h) db = new_matrix(call.n, call.r, call.gradient_dtype), call.db = db->mutable_data_ptr();
  check_memory(kIsas[isa].backward(call), call);
  return {dx, da, db};
}

// LoraSlices as bytes, for `batched`: lists of tensors take more time to cross over than there is in a step.
Tensor slices(const Tensors& a, const Tensors& b, const Tensors& ranks, const Tensors& scalings,
              const Tensors& first_row, const std::vector<int64_t>& max_ranks) {
  const int64_t size = a.size() * sizeof(LoraSlice);
  const Tensor bytes = new_empty(a[0], {size}, ScalarType::Byte);
  LoraSlice* slice = static_cast<LoraSlice*>(bytes.mutable_data_ptr());
  int64_t all_ranks = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    const bool packed = b[i].dim() == 2;
    slice[i] = {pointer(a[i]), pointer(b[i]), pointer<int64_t>(first_row[i]), pointer<int32_t>(ranks[i]),
                pointer<float>(scalings[i]), b[i].size(1), packed ? 1 : b[i].stride(1), b[i].stride(packed ? 0 : 2),
                max_ranks[i], all_ranks};
    all_ranks += max_ranks[i];
  }
  return bytes;
}

void batched(const Tensor& x, const MaybeTensor& w, const MaybeTensor& bias, const Tensor& y, const Tensor& slots,
             const Tensor& order, const MaybeTensor& weights, const Tensor& slices, int64_t num_slots, int64_t threads,
             int64_t isa) {
  LoraBatch call = {};
  call.x = pointer(x), call.w = pointer(w), call.bias = pointer(bias), call.y = y.mutable_data_ptr();
  call.slots = pointer<int32_t>(slots), call.order = pointer<int32_t>(order), call.weights = pointer<float>(weights);
  call.slices = pointer<LoraSlice>(slices), call.num_slices = slices.numel() / sizeof(LoraSlice);
  call.num_slots = num_slots, call.adapters_per_row = slots.dim() == 2 ? slots.size(1) : 1;
  call.rows = x.size(0), call.k = x.size(1), call.columns = y.size(1);
  call.stride_x = x.stride(0), call.stride_w = row_stride(w), call.stride_y = y.stride(0);
  call.dtype = dtype_of(x.scalar_type()), call.threads = threads;
  const LoraSlice& last = call.slices[call.num_slices - 1];
  const int64_t ranks = last.first_rank + last.max_rank, entries = call.rows * call.adapters_per_row;
  const Scratch packed_x(w ? (call.rows + 15) / 16 * 16 * call.k : 0), h(ranks * entries);
  STD_TORCH_CHECK(packed_x && h, "lora_linear_batched: no memory for ", entries, " x ", ranks, " elements of h");
  call.packed_x = packed_x, call.h = h;
  kIsas[isa].batched(call);
}

void dequantize(const Tensor& codes, const Tensor& scale, const Tensor& out, int64_t format, int64_t columns,
                int64_t block_rows, int64_t block_columns, int64_t threads, int64_t isa, const MaybeTensor& zero,
                const MaybeTensor& absmax, const MaybeTensor& nested_code, const MaybeTensor& nested_offset) {
  LoraDequantize weight = {};
  weight.codes = pointer(codes), weight.scale = pointer<float>(scale), weight.zero = pointer<uint8_t>(zero);
  weight.absmax = pointer<uint8_t>(absmax), weight.nested_code = pointer<float>(nested_code);
  weight.nested_offset = pointer<float>(nested_offset), weight.out = out.mutable_data_ptr();
  weight.elements = out.numel(), weight.columns = columns;
  weight.block_rows = block_rows, weight.block_columns = block_columns;
  if (format == LORA_INT4) weight.stride_row = codes.stride(0), weight.stride_word = codes.stride(1);
  weight.format = format, weight.dtype = dtype_of(out.scalar_type()), weight.threads = threads;
  while (!kIsas[isa].dequantize) ++isa;
  kIsas[isa].dequantize(weight);
}

}  // namespace

// Operands are as lora.h has them: lora_kernels/backends/cpu*.py see to that. `isa` is an index of kIsas.
STABLE_TORCH_LIBRARY(lora_kernels_cpu, library) {
  library.def(
      "forward(Tensor x, Tensor? w, Tensor? bias, Tensor a, Tensor b, float scaling, Tensor? seed, int keep_threshold, "
      "float keep_scale, int threads, int isa) -> (Tensor y, Tensor h)");
  library.def(
      "backward(Tensor dy, Tensor? x, Tensor? h, Tensor? w, Tensor a, Tensor b, float scaling, Tensor? seed, "
      "int keep_threshold, float keep_scale, bool needs_x, ScalarType gradient_dtype, int threads, int isa) "
      "-> (Tensor? dx, Tensor? da, Tensor? db)");
  library.def(
      "slices(Tensor[] a, Tensor[] b, Tensor[] ranks, Tensor[] scalings, Tensor[] first_row, int[] max_ranks) -> Tensor");
  library.def(
      "batched(Tensor x, Tensor? w, Tensor? bias, Tensor(a!) y, Tensor slots, Tensor order, Tensor? weights, Tensor slices, "
      "int num_slots, int threads, int isa) -> ()");
  library.def(
      "dequantize(Tensor codes, Tensor scale, Tensor(a!) out, int format, int columns, int block_rows, int block_columns, "
      "int threads, int isa, Tensor? zero=None, Tensor? absmax=None, Tensor? nested_code=None, "
      "Tensor? nested_offset=None) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(lora_kernels_cpu, CPU, library) {
  library.impl("forward", TORCH_BOX(&forward));
  library.impl("backward", TORCH_BOX(&backward));
  library.impl("slices", TORCH_BOX(&slices));
  library.impl("batched", TORCH_BOX(&batched));
  library.impl("dequantize", TORCH_BOX(&dequantize));
}

#define EXPORT __attribute__((visibility("default")))

extern "C" {

EXPORT int32_t lora_abi() { return LORA_ABI; }

EXPORT const char* lora_maker() {
#if defined(__x86_64__)
  if (__builtin_cpu_is("intel")) return "intel";
  if (__builtin_cpu_is("amd")) return "amd";
#endif
  return "other";
}

EXPORT const char* lora_isa_name(int32_t isa) { return isa < kCount ? kIsas[isa].name : nullptr; }

EXPORT int32_t lora_isa_supported(int32_t isa) { return kIsas[isa].supported(); }

}
