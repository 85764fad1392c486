// Small kernels that try the emulator itself: what it must compute, and mistakes it must find.
#include "cuda/async_copy.cuh"
#include "cuda/exp2.cuh"
#include "cuda/mma.cuh"

namespace jepa_fast::cuda {
namespace {

// out [16, 8] = a [16, K] b [8, K]^T by one warp, K 16 or 8; how the fragments are loaded depends on `trans`
template <typename T, int K, bool kTransposed>
__global__ void product_kernel(const T* a, const T* b, float* out) {
  __shared__ __align__(16) T tile_a[16][K];
  __shared__ __align__(16) T tile_b[8][K];  // B^T
  __shared__ __align__(16) T tile_k[K][8];  // B
  const int lane = int(threadIdx.x), g = lane / 4, t = lane % 4;
  for (int i = lane * 8; i < 16 * K; i += 256) async_copy_16(&tile_a[0][0] + i, a + i);
  for (int i = lane * 8; i < 8 * K; i += 256) async_copy_16(&tile_b[0][0] + i, b + i);
  async_copy_commit();
  async_copy_wait<0>();
  __syncwarp();
  for (int i = lane; i < 8 * K; i += 32) tile_k[i % K][i / K] = tile_b[i / K][i % K];
  __syncwarp();
  float d[4] = {0, 0, 0, 0};
  uint32_t ra[K / 4], rb[K / 8];
  load_matrices<K / 4>(ra, &tile_a[lane % 16][lane / 16 * 8 % K]);
  if constexpr (kTransposed) load_matrices<K / 8, true>(rb, &tile_k[lane % K][0]);
  else load_matrices<K / 8>(rb, &tile_b[lane % 8][lane / 8 * 8 % K]);
  if constexpr (K == 16) mma_16x8x16<T>(d, ra, rb);
  else mma_16x8x8<T>(d, ra, rb[0]);
  for (int e = 0; e < 4; ++e) out[(g + e / 2 * 8) * 8 + 2 * t + e % 2] = d[e];
}

__global__ void mistake_kernel(int which, float* out) {
  float* memory = shared_memory<float>();  // of blockDim.x floats
  const int i = int(threadIdx.x);
  if (which == 0 && i == 5) return;                         // has left
  if (which == 1 && i < 32) __syncthreads();                // meets elsewhere
  if (which == 2 && i == 7) __syncwarp();                   // alone in its warp
  if (which == 3) memory[i + 1] = 0.f;                      // beyond the end
  if (which == 4 && i == 3) { (void)__shfl_sync(1u, i, 0); }  // not in the mask
  if (which != 5) __syncthreads();
  out[i] = which == 6 ? memory[i] : float(i);               // 6: never written
}

// thread i takes what thread i + 1 or i - 1 wrote; without the barrier, in some blocks before it is there
__global__ void race_kernel(int shift, bool has_barrier, int* out) {
  __shared__ int values[64];
  const int i = int(threadIdx.x);
  values[i] = i;
  if (has_barrier) __syncthreads();
  out[int(blockIdx.x) * 64 + i] = values[(i + shift + 64) % 64];
}

__global__ void warp_kernel(const int* in, int* out) {
  const int i = int(threadIdx.x), x = in[i];
  const unsigned half_mask = i % 32 < 16 ? 0xffffu : 0xffff0000u;
  int down = 0, low = 0;
  for (int d = 16; d; d >>= 1) down += __shfl_down_sync(0xffffffff, x + down, d) * 0 + d;
  if (i % 32 < 16) low = __shfl_xor_sync(half_mask, x, 1);
  else low = __shfl_xor_sync(half_mask, x, 2);
  const int values[] = {down,
                        __shfl_sync(0xffffffff, x, 3, 8),
                        __shfl_up_sync(0xffffffff, x, 1),
                        __shfl_down_sync(0xffffffff, x, 5),
                        __shfl_xor_sync(0xffffffff, x, 16),
                        low,
                        int(__ballot_sync(0xffffffff, x & 1)),
                        __any_sync(0xffffffff, x == 7),
                        __all_sync(0xffffffff, x < 1000),
                        __reduce_add_sync(0xffffffff, x),
                        __syncthreads_count(x & 1),
                        __syncthreads_or(x == 40)};
  for (int k = 0; k < 12; ++k) out[k * int(blockDim.x) + i] = values[k];
}

__global__ void exp2_kernel(const float* x, float* out, int n) {
  for (int i = int(threadIdx.x); i < n; i += int(blockDim.x)) out[i] = exp2_polynomial(x[i]);
}

template <typename T>
void run_product(const Tensor& a, const Tensor& b, bool transposed, Tensor& out, cudaStream_t stream) {
  const auto *pa = static_cast<const T*>(a.data_ptr()), *pb = static_cast<const T*>(b.data_ptr());
  float* d = out.mutable_data_ptr<float>();
  const bool is_long = a.size(1) == 16;
  launch(is_long ? (transposed ? product_kernel<T, 16, true> : product_kernel<T, 16, false>)
                 : (transposed ? product_kernel<T, 8, true> : product_kernel<T, 8, false>),
         1, 32, 0, stream, pa, pb, d);
}

}  // namespace

void product(const Tensor& a, const Tensor& b, bool transposed, Tensor out) {
  const OnDevice device(a);
  if (a.scalar_type() == ScalarType::BFloat16) run_product<bf16>(a, b, transposed, out, device.stream);
  else run_product<half>(a, b, transposed, out, device.stream);
}
void mistake(int64_t which, Tensor out) {
  const OnDevice device(out);
  launch(mistake_kernel, 1, dim3(unsigned(out.numel())), size_t(out.numel() * 4), device.stream, int(which),
         out.mutable_data_ptr<float>());
}
void exp2(const Tensor& x, Tensor out) {
  const OnDevice device(x);
  launch(exp2_kernel, 1, 32, 0, device.stream, x.const_data_ptr<float>(), out.mutable_data_ptr<float>(), int(x.numel()));
}
void race(int64_t shift, bool has_barrier, Tensor out) {
  const OnDevice device(out);
  launch(race_kernel, dim3(unsigned(out.numel() / 64)), 64, 0, device.stream, int(shift), has_barrier,
         out.mutable_data_ptr<int32_t>());
}
void warps(const Tensor& in, Tensor out) {
  const OnDevice device(in);
  launch(warp_kernel, 1, dim3(unsigned(in.numel())), 0, device.stream, in.const_data_ptr<int32_t>(),
         out.mutable_data_ptr<int32_t>());
}

}  // namespace jepa_fast::cuda

STABLE_TORCH_LIBRARY(jepa_fast_cuda_self_test, m) {
  m.def("product(Tensor a, Tensor b, bool transposed, Tensor(a!) out) -> ()");
  m.def("mistake(int which, Tensor(a!) out) -> ()");
  m.def("exp2(Tensor x, Tensor(a!) out) -> ()");
  m.def("race(int shift, bool has_barrier, Tensor(a!) out) -> ()");
  m.def("warps(Tensor x, Tensor(a!) out) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(jepa_fast_cuda_self_test, JEPA_FAST_CUDA_KEY, m) {
  using namespace jepa_fast::cuda;
  m.impl("product", TORCH_BOX(&product));
  m.impl("mistake", TORCH_BOX(&mistake));
  m.impl("exp2", TORCH_BOX(&jepa_fast::cuda::exp2));
  m.impl("race", TORCH_BOX(&race));
  m.impl("warps", TORCH_BOX(&warps));
}
