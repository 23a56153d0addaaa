// The weight kernels as torch operators. Only bindings*.cpp include torch, and only its stable ABI: one binary works
// with every torch from 2.11 and every Python from 3.11.
#include <sys/mman.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <utility>
#include <vector>
#include <string>
#include <tuple>

#include "bindings.h"
#include "cpu/driver/experts.h"
#include "cpu/runtime/isa.h"
#include "cpu/quant/layout.h"
#include "cpu/driver/linear.h"
#include "cpu/runtime/mapped.h"
#include "cpu/runtime/numa.h"
#include "cpu/runtime/pool.h"
#include "cpu/runtime/probes.h"
#include "cpu/driver/bf16_rows.h"

namespace {
using namespace ktx;

std::string isa() { return ISA_NAMES[picked_isa()]; }
std::string best_isa_() { return ISA_NAMES[best_isa()]; }
// A function with a trailing underscore is the torch operator of the C++ function of that name: it converts and checks
// arguments.
int64_t threads_() { return threads(); }
void set_threads_(int64_t n) {
  STD_TORCH_CHECK(n >= 1 && n <= 1024, "threads must be 1 to 1024, got ", n);
  set_threads(int(n));
}
double probe_read_(int64_t threads, int64_t mib) { return probe_read(int(threads), int(mib)); }
double probe_fresh_(int64_t threads, int64_t mib) { return probe_fresh(int(threads), int(mib)); }
double probe_int8_(int64_t threads, double seconds) { return probe_int8(int(threads), seconds); }
double probe_fma_(int64_t threads, double seconds) { return probe_fma(int(threads), seconds); }
double probe_bf16_(int64_t threads, double seconds) { return probe_bf16(int(threads), seconds); }

double idle_seconds_() { return idle_seconds(); }
int64_t nodes_() { return nodes(); }
int64_t node_begin_(int64_t groups, int64_t node) {
  STD_TORCH_CHECK(groups >= 0 && node >= 0 && node <= nodes(), "no node ", node);
  return node_begin(groups, int(node));
}
Ints pages_on_(const Tensor& memory) {
  return pages_on(memory.const_data_ptr(), size_t(memory.numel()) * memory.element_size());
}
std::tuple<int64_t, int64_t> steal_stats_() { return {steal_stats().own, steal_stats().stolen}; }

// Returns the bytes of a packed [n, k] matrix.
int64_t packed_nbytes(int64_t code, int64_t n, int64_t k) {
  STD_TORCH_CHECK(n > 0, "a matrix needs rows, got ", n);
  return int64_t(packed_bytes(layout_of(code, k), n, k));
}

// Returns a uint8 tensor for packed weights, in huge pages if the system allows it. `ends`: ends of the NUMA nodes'
// shares, whose pages are placed on those nodes; torch's allocator can do neither.
Tensor empty_packed(int64_t nbytes, Ints ends) {
  STD_TORCH_CHECK(nbytes > 0, "nbytes must be positive, got ", nbytes);
  const size_t size = size_t(nbytes);
  void* memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  STD_TORCH_CHECK(memory != MAP_FAILED, "no memory for ", nbytes, " bytes of packed weights");
  madvise(memory, size, MADV_HUGEPAGE);  // fewer page faults and TLB misses, if the system allows it
  int64_t begin = 0;
  for (size_t node = 0; node < ends.size(); begin = ends[node++]) {
    STD_TORCH_CHECK(ends[node] >= begin && ends[node] <= nbytes, "ends must rise up to nbytes");
    bind_to_node(static_cast<uint8_t*>(memory) + begin, size_t(ends[node] - begin), int(node));
  }
  const int64_t sizes[1] = {nbytes}, strides[1] = {1};
  return torch::stable::from_blob(memory, {sizes, 1}, {strides, 1},
      torch::stable::Device(torch::headeronly::DeviceType::CPU), ScalarType::Byte,
      [size](void* p) { munmap(p, size); });
}

// Returns the bytes of a file as a uint8 tensor, mapped; see cpu/runtime/mapped.h.
Tensor map_file_(StringHandle handle) {
  const std::string path = take_string(handle);
  const Mapped file = map_file(path.c_str());
  STD_TORCH_CHECK(file.data, path, ": cannot be opened or mapped");
  const int64_t sizes[1] = {int64_t(file.size)}, strides[1] = {1};
  return torch::stable::from_blob(file.data, {sizes, 1}, {strides, 1},
      torch::stable::Device(torch::headeronly::DeviceType::CPU), ScalarType::Byte, [file](void*) { unmap(file); });
}

bool remap_huge_pages_(Tensor& mapped, int64_t begin, int64_t length) {
  STD_TORCH_CHECK(begin >= 0 && length > 0 && begin % int64_t(HUGE_PAGE) == 0 && begin + length <= mapped.numel(),
      "begin must be a multiple of a huge page inside the file");
  return remap_huge_pages(static_cast<uint8_t*>(mapped.mutable_data_ptr()) + begin, size_t(length));
}

void populate_(const Tensor& memory) {
  populate(memory.const_data_ptr(), size_t(memory.numel()) * memory.element_size());
}

// Packs rows of blocks (uint8, as checkpoints have them) to rows row0 and on of `dst`, a packed matrix [n, k]. Whole
// groups of 16, because a group is interleaved in memory. `scale`: the block scales of F8_E4M3, only for that type.
void pack(const Tensor& src, int64_t code, int64_t n, int64_t k, Tensor& dst, int64_t row0, const Optional& scale) {
  const Layout& layout = layout_of(code, k);
  const int64_t row_bytes = k / layout.block * layout.bytes;
  STD_TORCH_CHECK(src.scalar_type() == ScalarType::Byte && src.dim() == 2 && src.size(1) == row_bytes &&
          src.stride(1) == 1,
      "src must be uint8 [rows, ", row_bytes, "] for rows of ", k, " in ", layout.name);
  STD_TORCH_CHECK(row0 >= 0 && row0 % 16 == 0 && row0 + src.size(0) <= n &&
          (src.size(0) % 16 == 0 || row0 + src.size(0) == n),
      "rows ", row0, " to ", row0 + src.size(0), " of ", n, " do not make whole groups of 16");
  packed_data(dst, layout, 1, n, k, "dst");
  const int64_t columns = (k + 127) / 128;
  STD_TORCH_CHECK((layout.code == F8_E4M3) == scale.has_value(), layout.name,
      scale ? " takes no scale" : " needs its block scales");
  const float* scales = optional_float_data(scale, (n + 127) / 128 * columns, "scale");
  pack_rows(layout, static_cast<const uint8_t*>(src.const_data_ptr()), size_t(src.stride(0)), src.size(0), k,
      static_cast<uint8_t*>(dst.mutable_data_ptr()), row0, scales, columns);
}

// Returns rows of a packed matrix, dequantized to f32 [count, k], for embeddings and for gradients.
Tensor unpack_rows_(const Tensor& packed, int64_t code, int64_t n, int64_t k, const Tensor& rows) {
  const Layout& layout = layout_of(code, k);
  const uint8_t* data = packed_data(packed, layout, 1, n, k, "packed");
  STD_TORCH_CHECK(rows.scalar_type() == ScalarType::Long && rows.is_contiguous() && rows.dim() == 1,
      "rows must be int64 [count]");
  const int64_t* index = static_cast<const int64_t*>(rows.const_data_ptr());
  for (int64_t i = 0; i < rows.numel(); ++i)
    STD_TORCH_CHECK(index[i] >= 0 && index[i] < n, "row ", index[i], " of ", n, " rows");
  Tensor out = torch::stable::new_empty(packed, {rows.numel(), k}, std::make_optional(ScalarType::Float));
  if (rows.numel()) unpack_rows(layout, data, k, index, rows.numel(), static_cast<float*>(out.mutable_data_ptr()));
  return out;
}

// Quantizes f32 rows to uint8 blocks, which `pack` takes: load-time quantization.
Tensor quantize_rows_(const Tensor& x, int64_t code) {
  STD_TORCH_CHECK(x.dim() == 2 && x.is_contiguous() && x.scalar_type() == ScalarType::Float,
      "x must be contiguous float32 [rows, k]");
  STD_TORCH_CHECK(code == INT8_128 || code == INT4_64 || code == INT4_128 || code == Q4_0 || code == Q8_0,
      "weights are made in INT8_128, INT4_64, INT4_128, Q4_0 and Q8_0 only, not in type ", code);
  const Layout& layout = layout_of(code, x.size(1));
  Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(1) / layout.block * layout.bytes},
      std::make_optional(ScalarType::Byte));
  quantize_rows(layout, static_cast<const float*>(x.const_data_ptr()), x.size(0), x.size(1),
      static_cast<uint8_t*>(out.mutable_data_ptr()));
  return out;
}

// Returns y [..., n] = x [..., k] W^T + bias, of x's dtype, for a packed matrix W [n, k]. `all_bf16`: multiplies every
// row in bf16, see cpu/driver/bf16_rows.h.
Tensor linear_(const Tensor& x, const Tensor& packed, int64_t code, int64_t n, int64_t k, const Optional& bias,
    bool all_bf16) {
  const Layout& layout = layout_of(code, k);
  const uint8_t* data = packed_data(packed, layout, 1, n, k, "packed");
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == k && x.is_contiguous(), "x must be contiguous with ", k,
      " columns");
  const float* b = optional_float_data(bias, n, "bias");
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = n;
  Tensor y = torch::stable::new_empty(x, shape);
  if (x.numel())
    linear(x.const_data_ptr(), dtype_of(x), x.numel() / k, layout, data, n, k, b, y.mutable_data_ptr(), all_bf16);
  return y;
}

// Sets which rows of the thread's next calls are multiplied in bf16; see cpu/driver/bf16_rows.h. `tokens` -1: not set.
void bf16_rows_(int64_t tokens, Ints ranges) {
  STD_TORCH_CHECK(ranges.size() % 2 == 0, "ranges are pairs of a first row and a count");
  int64_t end = 0;
  for (size_t i = 0; i < ranges.size(); end = ranges[i] + ranges[i + 1], i += 2)
    STD_TORCH_CHECK(ranges[i] >= end && ranges[i + 1] >= 0 && ranges[i] + ranges[i + 1] <= tokens,
        "ranges must rise up to ", tokens, " rows");
  bf16_rows().tokens = tokens, bf16_rows().ranges.assign(ranges.begin(), ranges.end());
}
bool has_bf16_tiles() { return kernels().bf16_tiles; }

// Returns y [matrices, tokens, n]: each matrix times its own tokens x [matrices, tokens, k], as absorbed MLA needs it
// for the heads.
Tensor linear_batched_(const Tensor& x, const Tensor& packed, int64_t code, int64_t n, int64_t k) {
  const Layout& layout = layout_of(code, k);
  STD_TORCH_CHECK(x.dim() == 3 && x.size(2) == k && x.is_contiguous(), "x must be contiguous [matrices, tokens, ", k,
      "]");
  const uint8_t* data = packed_data(packed, layout, x.size(0), n, k, "packed");
  Tensor y = torch::stable::new_empty(x, {x.size(0), x.size(1), n});
  if (x.numel())
    linear_batched(x.const_data_ptr(), dtype_of(x), x.size(0), x.size(1), layout, data, n, k, y.mutable_data_ptr());
  return y;
}

// Returns the weighted sum of each token's experts, [tokens, hidden]; see cpu/driver/experts.h. `alpha` and `limit` are
// parameters of the activation swiglu_oai; `counts`: the statistics to add to, see optional_stats.
Tensor experts_(const Tensor& x, const Tensor& ids, const Tensor& weights, const Tensor& gate, const Tensor& up,
    const Tensor& down, int64_t gate_code, int64_t up_code, int64_t down_code, int64_t n_experts, int64_t ff,
    const Optional& gate_bias, const Optional& up_bias, const Optional& down_bias, StringHandle act_word, double alpha,
    double limit, const Optional& counts) {
  const std::string act = take_string(act_word);
  STD_TORCH_CHECK(x.dim() == 2 && x.is_contiguous(), "x must be contiguous [tokens, hidden]");
  STD_TORCH_CHECK(n_experts > 0 && ff > 0, "n_experts and ff must be positive");
  const int64_t tokens = x.size(0), hidden = x.size(1);
  STD_TORCH_CHECK(ids.scalar_type() == ScalarType::Long && ids.dim() == 2 && ids.is_contiguous() &&
          ids.size(0) == tokens,
      "ids must be contiguous int64 [tokens, top]");
  STD_TORCH_CHECK(weights.dim() == 2 && weights.size(0) == tokens && weights.size(1) == ids.size(1),
      "weights must be float32 [tokens, top]");
  const Layout &gate_layout = layout_of(gate_code, hidden), &up_layout = layout_of(up_code, hidden),
               &down_layout = layout_of(down_code, ff);
  Tensor out = torch::stable::new_empty(x, {tokens, hidden});
  ExpertsCall call{x.const_data_ptr(), out.mutable_data_ptr(), dtype_of(x),
      static_cast<const int64_t*>(ids.const_data_ptr()), optional_float_data(weights, tokens * ids.size(1), "weights"),
      tokens, ids.size(1), hidden, ff, n_experts,
      {&gate_layout, packed_data(gate, gate_layout, n_experts, ff, hidden, "gate"),
          optional_float_data(gate_bias, n_experts * ff, "gate_bias")},
      {&up_layout, packed_data(up, up_layout, n_experts, ff, hidden, "up"),
          optional_float_data(up_bias, n_experts * ff, "up_bias")},
      {&down_layout, packed_data(down, down_layout, n_experts, hidden, ff, "down"),
          optional_float_data(down_bias, n_experts * hidden, "down_bias")},
      parse_activation(act), float(alpha), float(limit), optional_stats(counts, n_experts)};
  if (tokens) experts(call);
  return out;
}

// Returns c [rows, 64] + a [rows, bytes] times b [bytes/4, 64], all uint8, on AMX tiles or, if `model`, emulated; see
// cpu/isa/kernels.h. Tests compare the two.
Tensor tile_dot(StringHandle kind_word, const Tensor& a, const Tensor& b, const Tensor& c, bool model) {
  const std::string kind = take_string(kind_word);
  for (const Tensor* t : {&a, &b, &c})
    STD_TORCH_CHECK(t->dim() == 2 && t->is_contiguous() && t->scalar_type() == ScalarType::Byte,
        "tiles must be contiguous uint8 [rows, bytes]");
  const int64_t rows = a.size(0), bytes = a.size(1);
  STD_TORCH_CHECK(rows >= 1 && rows <= 16 && bytes >= 4 && bytes <= 64 && bytes % 4 == 0, "a is [", rows, ", ", bytes,
      "], a tile has up to 16 rows of up to 64 bytes");
  STD_TORCH_CHECK(b.size(0) == bytes / 4 && b.size(1) == 64 && c.size(0) == rows && c.size(1) == 64,
      "b and c do not fit a");
  STD_TORCH_CHECK(model || best_isa() == AMX, "this machine has no AMX tiles");
  Tensor out = torch::stable::clone(c);
  const TileKind tile_kind = parse_enum<TileKind>(kind, {{"ssd", SSD}, {"usd", USD}, {"bf16", PAIRS_OF_BF16}}, "kind");
  (model ? tile_dot_model : tile_dot_amx)(tile_kind, int(rows), int(bytes), a.const_data_ptr(), b.const_data_ptr(),
      out.mutable_data_ptr());
  return out;
}
}  // namespace

// The schemas of this file's operators.
STABLE_TORCH_LIBRARY(ktx, m) {
  m.def("isa() -> str");
  m.def("best_isa() -> str");
  m.def("threads() -> int");
  m.def("set_threads(int n) -> ()");
  m.def("probe_read(int threads, int mib) -> float");
  m.def("probe_fresh(int threads, int mib) -> float");
  m.def("probe_int8(int threads, float seconds) -> float");
  m.def("tile_dot(str kind, Tensor a, Tensor b, Tensor c, bool model) -> Tensor");
  m.def("probe_fma(int threads, float seconds) -> float");
  m.def("probe_bf16(int threads, float seconds) -> float");
  m.def("packed_nbytes(int code, int n, int k) -> int");
  m.def("empty_packed(int nbytes, int[] ends=[]) -> Tensor");
  m.def("idle_seconds() -> float");
  m.def("nodes() -> int");
  m.def("node_begin(int groups, int node) -> int");
  m.def("map_file(str path) -> Tensor");
  m.def("remap_huge_pages(Tensor(a!) mapped, int begin, int length) -> bool");
  m.def("populate(Tensor memory) -> ()");
  m.def("pages_on(Tensor memory) -> int[]");
  m.def("steal_stats() -> (int, int)");
  m.def("pack(Tensor src, int code, int n, int k, Tensor(a!) dst, int row0, Tensor? scale=None) -> ()");
  m.def("quantize_rows(Tensor x, int code) -> Tensor");
  m.def("unpack_rows(Tensor packed, int code, int n, int k, Tensor rows) -> Tensor");
  m.def("linear(Tensor x, Tensor packed, int code, int n, int k, Tensor? bias=None, bool all_bf16=False) -> Tensor");
  m.def("bf16_rows(int tokens, int[] ranges) -> ()");
  m.def("has_bf16_tiles() -> bool");
  m.def("linear_batched(Tensor x, Tensor packed, int code, int n, int k) -> Tensor");
  m.def(
      "experts(Tensor x, Tensor ids, Tensor weights, Tensor gate, Tensor up, Tensor down, int gate_code, int up_code, "
      "int down_code, int n_experts, int ff, Tensor? gate_bias, Tensor? up_bias, Tensor? down_bias, str act, "
      "float alpha, float limit, Tensor(a!)? counts=None) -> Tensor");
}
// Operators without tensor arguments, by whose device torch would pick the implementation.
STABLE_TORCH_LIBRARY_IMPL(ktx, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&isa));
  m.impl("best_isa", TORCH_BOX(&best_isa_));
  m.impl("threads", TORCH_BOX(&threads_));
  m.impl("set_threads", TORCH_BOX(&set_threads_));
  m.impl("probe_read", TORCH_BOX(&probe_read_));
  m.impl("probe_fresh", TORCH_BOX(&probe_fresh_));
  m.impl("probe_int8", TORCH_BOX(&probe_int8_));
  m.impl("probe_fma", TORCH_BOX(&probe_fma_));
  m.impl("probe_bf16", TORCH_BOX(&probe_bf16_));
  m.impl("packed_nbytes", TORCH_BOX(&packed_nbytes));
  m.impl("map_file", TORCH_BOX(&map_file_));
  m.impl("empty_packed", TORCH_BOX(&empty_packed));
  m.impl("idle_seconds", TORCH_BOX(&idle_seconds_));
  m.impl("nodes", TORCH_BOX(&nodes_));
  m.impl("bf16_rows", TORCH_BOX(&bf16_rows_));
  m.impl("has_bf16_tiles", TORCH_BOX(&has_bf16_tiles));
  m.impl("node_begin", TORCH_BOX(&node_begin_));
  m.impl("steal_stats", TORCH_BOX(&steal_stats_));
}
STABLE_TORCH_LIBRARY_IMPL(ktx, CPU, m) {
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("remap_huge_pages", TORCH_BOX(&remap_huge_pages_));
  m.impl("populate", TORCH_BOX(&populate_));
  m.impl("pages_on", TORCH_BOX(&pages_on_));
  m.impl("quantize_rows", TORCH_BOX(&quantize_rows_));
  m.impl("unpack_rows", TORCH_BOX(&unpack_rows_));
  m.impl("tile_dot", TORCH_BOX(&tile_dot));
  m.impl("linear", TORCH_BOX(&linear_));
  m.impl("linear_batched", TORCH_BOX(&linear_batched_));
  m.impl("experts", TORCH_BOX(&experts_));
}
