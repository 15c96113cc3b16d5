// Writes data/layouts.json: where CuTe (PyPI's nvidia-cutlass) says that each element lies. test_emulator_layouts.py
// compares the emulator with it, and says how to run this.
//
// All sizes are powers of two and all maps are linear in the bits of their arguments, as exclusive or; so a map is what
// it makes of each single bit. That it is linear is checked here for all arguments.
#include <cute/atom/copy_traits_sm75.hpp>
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>
#include <vector>

using namespace cute;

static FILE* out;
static bool first = true;

// (first argument, second argument) -> a number
template <class F>
void map(const char* name, const char* of, int firsts, int seconds, F f) {
  std::vector<int> bits[2];
  for (int i = 1; i < firsts; i *= 2) bits[0].push_back(f(i, 0));
  for (int j = 1; j < seconds; j *= 2) bits[1].push_back(f(0, j));
  for (int i = 0; i < firsts; ++i)
    for (int j = 0; j < seconds; ++j) {
      int sum = 0;
      for (int bit = 0; bit < 16; ++bit) {
        if (i >> bit & 1) sum ^= bits[0][bit];
        if (j >> bit & 1) sum ^= bits[1][bit];
      }
      if (sum != int(f(i, j))) fprintf(stderr, "%s is not linear\n", name), exit(1);
    }
  fprintf(out, "%s\n  \"%s\": {\"of\": \"%s\"", first ? "{" : ",", name, of);
  first = false;
  for (int k = 0; k < 2; ++k) {
    fprintf(out, ", \"bits%d\": [", k);
    for (size_t i = 0; i < bits[k].size(); ++i) fprintf(out, "%s%d", i ? ", " : "", bits[k][i]);
    fprintf(out, "]");
  }
}

template <class L>
void fragment(const char* name, L layout, int rows) {
  // CuTe counts elements column by column.
  const auto element = [&](int lane, int value) { return int(layout(lane, value)); };
  map(name, "lane, value -> row + rows * column", size<0>(layout), size<1>(layout), element);
  fprintf(out, ", \"rows\": %d}", rows);
}

template <class Traits>
void ldmatrix(const char* name) {
  typename Traits::DstLayout to;
  map(name, "lane, 16-bit value -> 8 * lane that gives the row's address + element of that row", 32, 8,
      [&](int lane, int value) { return int(to(lane, 16 * value)) / 16; });
  fprintf(out, "}");
}

template <GMMA::Major major, class L>
void tile(const char* name, L addresses) {
  // CuTe's own swizzles bits of the address; this one, bits of the element's number.
  const auto layout = as_position_independent_swizzle_layout(addresses);
  constexpr int rows = size<0>(L{}), columns = size<1>(L{}), blocks = columns / 16;
  map(name, "row, k -> 16-bit element in shared memory", rows, columns,
      [&](int i, int j) { return int(layout(i, j)); });
  auto all = make_tensor(make_smem_ptr(static_cast<bfloat16_t*>(nullptr)), addresses);
  fprintf(out, ", \"rows\": %d, \"columns\": %d, \"descriptors\": [", rows, columns);
  cute::for_each(make_int_sequence<blocks>{}, [&](auto k) {
    auto part = local_tile(all, Shape<Int<rows>, _16>{}, make_coord(_0{}, k));
    GmmaDescriptor d = GMMA::make_gmma_desc<major>(part);
    // make_gmma_desc asks the device for the address, in vain (and says so on standard output).
    d.bitfield.start_address_ = uint16_t(int(layout(0, 16 * k)) * 2 >> 4);
    fprintf(out, "%s\"%016llx\"", int(k) ? ", " : "", static_cast<unsigned long long>(d.desc_));
  });
  fprintf(out, "]}");
}

int main(int, char** arguments) {
  out = fopen(arguments[1], "w");
  using Mma16 = MMA_Traits<SM80_16x8x16_F32BF16BF16F32_TN>;
  fragment("mma a", Mma16::ALayout{}, 16);
  fragment("mma b", Mma16::BLayout{}, 8);
  fragment("mma d", Mma16::CLayout{}, 16);
  using Mma32 = MMA_Traits<SM80_16x8x8_F32TF32TF32F32_TN>;
  fragment("mma_tf32 a", Mma32::ALayout{}, 16);
  fragment("mma_tf32 b", Mma32::BLayout{}, 8);
  fragment("mma_tf32 d", Mma32::CLayout{}, 16);
  ldmatrix<Copy_Traits<SM75_U32x4_LDSM_N>>("ldmatrix");
  ldmatrix<Copy_Traits<SM75_U16x8_LDSM_T>>("ldmatrix_trans");
  fragment("wgmma d 64", GMMA::CLayout_64x64{}, 64);
  fragment("wgmma d 128", GMMA::CLayout_64x128{}, 64);

  // "mn first": blocks of 64 elements (8 rows, where k is contiguous) follow each other along the rows, then along k.
  using K = GMMA::Layout_K_SW128_Atom<bfloat16_t>;
  using MN = GMMA::Layout_MN_SW128_Atom<bfloat16_t>;
  const auto mn_first = Step<_1, _2>{};
  const auto k_first = Step<_2, _1>{};
  tile<GMMA::Major::K>("k-major 64, mn first", tile_to_shape(K{}, Shape<_64, _128>{}, mn_first));
  tile<GMMA::Major::K>("k-major 128, mn first", tile_to_shape(K{}, Shape<_128, _128>{}, mn_first));
  tile<GMMA::Major::K>("k-major 64, k first", tile_to_shape(K{}, Shape<_64, _128>{}, k_first));
  tile<GMMA::Major::K>("k-major 128, k first", tile_to_shape(K{}, Shape<_128, _128>{}, k_first));
  tile<GMMA::Major::MN>("mn-major 64, mn first", tile_to_shape(MN{}, Shape<_64, _64>{}, mn_first));
  tile<GMMA::Major::MN>("mn-major 128, mn first", tile_to_shape(MN{}, Shape<_128, _64>{}, mn_first));
  tile<GMMA::Major::MN>("mn-major 64, k first", tile_to_shape(MN{}, Shape<_64, _64>{}, k_first));
  tile<GMMA::Major::MN>("mn-major 128, k first", tile_to_shape(MN{}, Shape<_128, _64>{}, k_first));
  fprintf(out, "\n}\n");
}
