// jepa_fast._masking: the mask samplers for Python. NumPy int64 arrays come out; the GIL is free while they are drawn.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "multiblock.h"
#include "multiblock3d.h"

namespace py = pybind11;
namespace masking = jepa_fast::masking;

namespace {

py::array_t<int64_t> to_array(std::unique_ptr<int64_t[]> data, std::vector<py::ssize_t> shape) {
  int64_t* pointer = data.release();
  py::capsule owner(pointer, [](void* p) { delete[] static_cast<int64_t*>(p); });
  return py::array_t<int64_t>(std::move(shape), pointer, owner);
}

// (context_idx [P_c], context_lengths [E, B], target_idx [P_t], target_lengths [M, B])
py::tuple to_tuple(masking::Masks masks, int64_t batch_size) {
  masking::Lists &c = masks.contexts, &t = masks.targets;
  return py::make_tuple(to_array(std::move(c.idx), {c.num_tokens}),
                        to_array(std::move(c.lengths), {c.num_lists, batch_size}),
                        to_array(std::move(t.idx), {t.num_tokens}),
                        to_array(std::move(t.lengths), {t.num_lists, batch_size}));
}

template <typename Sample>
py::tuple without_gil(int64_t batch_size, Sample sample) {
  masking::Masks masks;
  {
    py::gil_scoped_release release;
    masks = sample();
  }
  return to_tuple(std::move(masks), batch_size);
}

template <typename Settings>
py::tuple next_official(const Settings& settings, masking::TorchGenerator& positions, uint64_t counter,
                        int64_t batch_size) {
  // a copy, so that two Python threads never write to one generator
  masking::TorchGenerator running = positions;
  py::tuple masks = without_gil(
      batch_size, [&] { return masking::next_official(settings, running, counter, batch_size); });
  positions = running;
  return masks;
}

template <typename Settings>
py::tuple sample_official(const Settings& settings, int64_t mask_group_size, uint64_t seed, uint32_t step,
                          int64_t first_sample, int64_t batch_size) {
  return without_gil(batch_size, [&] {
    return masking::sample_official(settings, mask_group_size, seed, step, first_sample, batch_size);
  });
}

template <typename Settings>
py::tuple sample_unbiased(const Settings& settings, uint64_t seed, uint32_t step, int64_t first_sample,
                          int64_t batch_size) {
  return without_gil(
      batch_size, [&] { return masking::sample_unbiased(settings, seed, step, first_sample, batch_size); });
}

template <typename Settings>
void def_samplers(py::module_& m) {
  m.def("next_official", &next_official<Settings>, py::arg("settings"), py::arg("positions"), py::arg("counter"),
        py::arg("batch_size"));
  m.def("sample_official", &sample_official<Settings>, py::arg("settings"), py::arg("mask_group_size"), py::arg("seed"),
        py::arg("step"), py::arg("first_sample"), py::arg("batch_size"));
  m.def("sample_unbiased", &sample_unbiased<Settings>, py::arg("settings"), py::arg("seed"), py::arg("step"),
        py::arg("first_sample"), py::arg("batch_size"));
}

}  // namespace

PYBIND11_MODULE(_masking, m) {
  m.doc() = "Mask samplers in C++; jepa_fast.masking is the public side.";

  py::class_<masking::TorchGenerator>(m, "PositionStream")
      .def(py::init<uint64_t, uint64_t>(), py::arg("seed"), py::arg("draws") = 0)
      .def_static(
          "continue_from",
          [](const std::vector<uint32_t>& words, size_t used) {
            if (words.size() != 624 || used > 624)
              throw std::invalid_argument("words must be the 624 of an mt19937, used at most 624");
            return masking::TorchGenerator(words, used);
          },
          py::arg("words"), py::arg("used"))
      .def("integer", &masking::TorchGenerator::integer, py::arg("n"))
      .def("uniform", &masking::TorchGenerator::uniform)
      .def_property_readonly("draws", &masking::TorchGenerator::draws);

  py::class_<masking::Settings>(m, "Settings")
      .def(py::init([](int64_t rows, int64_t columns, int64_t num_targets, int64_t num_contexts,
                       masking::Range target_scale, masking::Range context_scale, masking::Range aspect_ratio,
                       int64_t min_keep, bool allow_overlap) {
             return masking::Settings{rows, columns, num_targets, num_contexts, target_scale, context_scale,
                                      aspect_ratio, min_keep, allow_overlap};
           }),
           py::kw_only(), py::arg("rows"), py::arg("columns"), py::arg("num_targets"), py::arg("num_contexts"),
           py::arg("target_scale"), py::arg("context_scale"), py::arg("aspect_ratio"), py::arg("min_keep"),
           py::arg("allow_overlap"));

  py::class_<masking::BlockMask>(m, "BlockMask")
      .def(py::init([](int64_t num_blocks, masking::Range spatial_scale, masking::Range temporal_scale,
                       masking::Range aspect_ratio, double max_temporal_keep, int64_t max_keep, bool full_complement,
                       bool pred_full_complement, bool inv_block) {
             return masking::BlockMask{num_blocks,        spatial_scale, temporal_scale,  aspect_ratio,
                                       max_temporal_keep, max_keep,      full_complement, pred_full_complement,
                                       inv_block};
           }),
           py::kw_only(), py::arg("num_blocks"), py::arg("spatial_scale"), py::arg("temporal_scale"),
           py::arg("aspect_ratio"), py::arg("max_temporal_keep"), py::arg("max_keep"), py::arg("full_complement"),
           py::arg("pred_full_complement"), py::arg("inv_block"));

  py::class_<masking::Settings3D>(m, "Settings3D")
      .def(py::init([](int64_t time, int64_t rows, int64_t columns, std::vector<masking::BlockMask> masks) {
             return masking::Settings3D{time, rows, columns, std::move(masks)};
           }),
           py::kw_only(), py::arg("time"), py::arg("rows"), py::arg("columns"), py::arg("masks"));

  m.def("philox", &masking::philox, py::arg("counter"), py::arg("seed"));
  def_samplers<masking::Settings>(m);
  def_samplers<masking::Settings3D>(m);
}
