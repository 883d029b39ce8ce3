#include "python/tensor_list.h"

#include <algorithm>
#include <stdexcept>

#include "prodigy/chunks.h"
#include "python/memory.h"

namespace prodigy {
namespace py = pybind11;

namespace {

// Tensors between the one that is compared and the one whose memory is fetched.
constexpr std::size_t kFetchAhead = 4;

// As the very objects that a dictionary written in Python has as its keys, so that finding them compares no characters.
ParameterImage::Keys interned_keys() {
  ParameterImage::Keys keys;
  for (int which = 0; which < kStates; ++which) {
    keys[which] = py::reinterpret_steal<py::str>(PyUnicode_InternFromString(kStateKeys[which]));
  }
  return keys;
}

}  // namespace

TensorList::TensorList(const py::list& slots, py::type tensor_class, const std::string& state_format,
                       std::size_t estimates)
    : tensor_class_(tensor_class),
      reader_(std::move(tensor_class)),
      keys_(interned_keys()),
      state_type_(type_named(state_format)),
      estimates_(estimates),
      group_count_(estimates) {
  if (state_type_ == Type::kOther) throw py::value_error("unsupported state format: " + state_format);
  extend(slots);
}

void TensorList::extend(const py::list& slots) {
  std::vector<Entry> new_entries;
  std::vector<Tensor> new_table;
  read_new(slots, new_entries, new_table);
  if (entries_.size() + new_entries.size() != slots.size()) throw py::value_error("a slot is missing, or moved");
  // Nothing but memory can fail from here on.
  std::size_t at = 0, added = 0;
  for (const py::handle slot : slots) {
    if (at == entries_.size() || !entries_[at].slot.is(slot)) {
      images_.emplace(images_.begin() + at, new_entries[added].param, new_entries[added].state);
      entries_.insert(entries_.begin() + at, std::move(new_entries[added]));
      table_.insert(table_.begin() + at, new_table[added++]);
    }
    ++at;
  }
  for (const Tensor& t : new_table) group_count_ = std::max(group_count_, std::size_t(t.group) + 1);
  release_gradients();
}

void TensorList::read_new(const py::list& slots, std::vector<Entry>& entries, std::vector<Tensor>& table) {
  std::size_t known = 0;
  int estimate = 0;
  for (const py::handle slot : slots) {
    const bool is_known = known < entries_.size() && entries_[known].slot.is(slot);
    if (!is_known) table.push_back(read_slot(slot, entries.emplace_back()));
    const int own = is_known ? table_[known++].estimate : table.back().estimate;
    if (own < estimate || std::size_t(own) >= estimates_) {
      throw py::value_error("estimate " + std::to_string(own) + ": out of range, or out of order");
    }
    estimate = own;
  }
}

Tensor TensorList::read_slot(const py::handle& slot, Entry& entry) {
  entry.slot = slot;
  entry.param = slot.attr("param");
  entry.state = slot.attr("state");
  TensorView view;
  const bool readable = reader_.read(entry.param.ptr(), view) && view.device != kOtherDevice && is_floating(view.type);
  const bool first = type_ == Type::kOther;
  if (!readable || (!first && (view.type != type_ || view.device != device_))) {
    throw py::value_error("unsupported parameter");
  }
  type_ = view.type;
  device_ = view.device;
  entry.layout = view.layout();
  const py::object rounding = slot.attr("low_precision");
  const auto is = [&](const char* mode) { return !rounding.is_none() && rounding.equal(py::str(mode)); };
  entry.displaced = is("displacement");
  entry.extended = is("24bit");
  entry.moves_in_codes = slot.attr("moves_in_codes").cast<bool>();
  entry.frozen = slot.attr("frozen").cast<bool>();
  Tensor t{};
  t.type = type_;
  t.state_type = state_type_;
  t.index = slot.attr("random_index").cast<std::uint32_t>();
  t.stochastic = entry.extended || is("stochastic");
  t.numel = view.numel();
  t.slice_p = slot.attr("slice_p").cast<std::int64_t>();
  t.group = slot.attr("group").cast<int>();
  if (t.group < 0) throw py::value_error("a negative group");
  t.estimate = slot.attr("estimate").cast<int>();
  t.order = memory_order(view);
  entry.packed = t.slice_p > 1;
  const bool sampled = entry.packed && !entry.frozen;
  if (sampled || (needs_random_bits(t) && !is_coded(state_type_))) t.where = index_map(slot.attr("where"), t);
  if (is_coded(state_type_) && t.where.length < t.numel) throw py::value_error("blocks of codes in parts of a shard");
  entry.samples = sample_count(t.where, t.numel, t.slice_p);
  read_addresses(entry, t);
  return t;
}

void TensorList::read_addresses(Entry& entry, Tensor& t) const {
  TensorView view;
  if (!read_param(entry, view)) throw py::value_error("the parameter has changed");
  t.x = entry.data = view.data;
  for (int which = 0; which < kStates; ++which) entry.states[which] = read_state(entry, t, which);
  t.m = entry.states[kM];
  t.v = entry.states[kV];
  t.s = entry.states[kS];
  t.x0 = entry.states[kX0];
  t.delta = static_cast<float*>(entry.states[kDelta]);
  t.low = static_cast<std::int8_t*>(entry.states[kLow]);
  t.scale = static_cast<std::uint8_t*>(entry.states[kScale]);
  if (is_coded(state_type_)) {
    t.delta = nullptr;
    t.moved = static_cast<std::int8_t*>(entry.states[kDelta]);
  }
}

bool TensorList::read_param(const Entry& entry, TensorView& view) const {
  return reader_.read(entry.param.ptr(), view) && view.device == device_ && view.type == type_ &&
         view.has(entry.layout);
}

ParameterImage::Needs TensorList::needs(const Entry& entry) const {
  ParameterImage::Needs needs;
  needs[kM] = needs[kV] = true;
  needs[kS] = !entry.frozen;
  needs[kX0] = entry.displaced || (!entry.frozen && !entry.moves_in_codes);
  needs[kDelta] = entry.displaced || entry.moves_in_codes;
  needs[kLow] = entry.extended;
  needs[kScale] = is_coded(state_type_);
  return needs;
}

PyObject* TensorList::find_state(const Entry& entry, int which) const {
  return PyDict_GetItemWithError(entry.state.ptr(), keys_[which].ptr());
}

void* TensorList::read_state(const Entry& entry, const Tensor& tensor, int which) const {
  if (!needs(entry)[which]) return nullptr;
  PyObject* object = find_state(entry, which);
  if (object == nullptr && which == kM) return nullptr;  // beta1 is 0
  TensorView view;
  if (object == nullptr || !reader_.read(object, view) || view.device != device_ ||
      !fits_type(view.type, which, entry.packed)) {
    throw py::value_error("unsupported state");
  }
  const bool packed = entry.packed && (which == kS || which == kX0);
  if (which == kX0 && view.dims == 0 && (packed || !entry.layout.shape.empty())) return nullptr;
  const auto is_run = [&](std::int64_t n) {
    return view.dims == 1 && view.shape[0] == n && (n <= 1 || view.strides[0] == 1);
  };
  if (which == kScale) {
    if (!is_scale(view, tensor.numel)) throw py::value_error("scale of another shape");
    return view.data;
  }
  if (!(packed ? is_run(entry.samples) : view.has(entry.layout))) throw py::value_error("state of another shape");
  return view.data;
}

bool TensorList::fits_type(Type type, int which, bool packed) const {
  const bool coded = is_coded(state_type_);
  if (which == kX0) return type == type_;
  if (which == kDelta) return type == (coded ? Type::kInt8 : Type::kFloat32);
  if (which == kLow) return type == Type::kInt8;
  if (which == kS && coded && packed) return type == Type::kFloat32;
  return type == state_type_ && (type == Type::kFloat64) == (type_ == Type::kFloat64);
}

bool TensorList::unchanged() {
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    if (i + kFetchAhead < entries_.size()) images_[i + kFetchAhead].fetch();
    if (images_[i].shows()) continue;
    if (!is_unchanged(entries_[i], table_[i])) return false;
    images_[i].take(needs(entries_[i]), keys_, reader_, tensor_class_);
    if (i > 0) images_[i].share(images_[i - 1]);
  }
  return true;
}

bool TensorList::unchanged_at(std::size_t i) const { return is_unchanged(entries_.at(i), table_[i]); }

bool TensorList::is_unchanged(const Entry& entry, const Tensor& tensor) const {
  TensorView now;
  if (!read_param(entry, now) || now.data != entry.data) return false;
  for (int which = 0; which < kStates; ++which) {
    try {
      if (read_state(entry, tensor, which) != entry.states[which]) return false;
    } catch (const py::value_error&) {
      return false;
    }
  }
  return true;
}

bool TensorList::mend() {
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    if (images_[i].shows()) continue;
    images_[i].forget();
    const bool momentum = table_[i].m != nullptr;
    try {
      read_addresses(entries_[i], table_[i]);
    } catch (const py::value_error&) {
      return false;
    }
    if ((table_[i].m != nullptr) != momentum) return false;  // exp_avg was taken away, or given back
  }
  release_gradients();
  return true;
}

void TensorList::fetch_gradient(PyObject* grad, const Entry& entry) const {
  if (reader_.is_tensor(grad)) TensorImage::fetch_rest(grad);
  fetch_lines(entry.layout.shape.data(), 1);
  fetch_lines(entry.layout.strides.data(), 1);
}

bool TensorList::read_gradient(PyObject* object, const Entry& entry, Gradient& gradient) const {
  TensorView view;
  const bool fits = reader_.read(object, view) && view.device == device_ &&
                    (view.type == type_ || (is_half(type_) && view.type == Type::kFloat32)) && view.has(entry.layout) &&
                    !TensorImage::is_negated(object);
  if (fits) gradient = {view.data, view.type};
  return fits;
}

long TensorList::load_gradients(const py::list& grads, std::size_t first) {
  if (grads.size() != entries_.size()) throw py::value_error("one gradient, or None, per tensor");
  if (first == 0 || grads_.size() != entries_.size()) grads_.assign(entries_.size(), Gradient{});
  for (std::size_t i = first; i < entries_.size(); ++i) {
    if (i + kFetchAhead < entries_.size()) {
      fetch_gradient(PyList_GET_ITEM(grads.ptr(), i + kFetchAhead), entries_[i + kFetchAhead]);
    }
    PyObject* grad = PyList_GET_ITEM(grads.ptr(), i);
    if (grad != Py_None && !read_gradient(grad, entries_[i], grads_[i])) return long(i);
  }
  return -1;
}

bool TensorList::read_one_gradient(std::size_t i, const py::handle& grad, Gradient& gradient) const {
  return read_gradient(grad.ptr(), entries_.at(i), gradient);
}

const std::vector<Gradient>& TensorList::gradients() const {
  if (grads_.size() != entries_.size()) throw std::logic_error("no gradients are loaded: call load_gradients first");
  return grads_;
}

}  // namespace prodigy
