// The part of DLPack's binary interface that pynas uses: https://github.com/dmlc/dlpack, version 1.
// Fields keep the order and the types of the standard, not its names.
#pragma once

#include <cstdint>

namespace pynas::dlpack {

constexpr uint32_t kMajor = 1, kMinor = 3;
constexpr int32_t kCpu = 1;
constexpr uint8_t kInt = 0, kFloat = 2, kBool = 6;  // codes of data types

struct Version {
  uint32_t major, minor;
};

struct Device {
  int32_t type, id;
};

struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; null, before version 1.2, where the tensor is dense
  uint64_t byte_offset;
};

// What __dlpack__() gives without max_version.
struct ManagedTensor {
  Tensor tensor;
  void* context;
  void (*deleter)(ManagedTensor*);
};

struct VersionedTensor {
  Version version;
  void* context;
  void (*deleter)(VersionedTensor*);
  uint64_t flags;
  Tensor tensor;
};

// Type.__dlpack_c_exchange_api__: how C code reads and makes the tensors of a Python type. The
// functions return 0, or -1 with a Python exception set.
struct ExchangeApi {
  Version version;
  ExchangeApi* previous;
  void (*allocate)();
  void (*from_python)();
  int (*to_python)(VersionedTensor* stolen, void** out);
  int (*view_of_python)(void* tensor, Tensor* out);  // may be null; the view is borrowed
  void (*current_stream)();
};

}  // namespace pynas::dlpack
