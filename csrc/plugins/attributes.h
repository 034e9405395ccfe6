// A plug-in's attributes are a plain struct of 32-bit members and of arrays of them, which a schema names. From the
// schema follow the fields that a creator lists, how a struct is read from fields, and how the state in a serialised
// engine is written and read.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

#include "tensorrt_api.h"

namespace qwen_plugins {

// An attribute of up to kMaxSize numbers.
struct Int32Array {
  static constexpr int32_t kMaxSize = 64;
  int32_t size = 0;
  std::array<int32_t, kMaxSize> values{};
};

struct AttributeSpec {
  char const* name;
  nvinfer1::PluginFieldType type;  // kFLOAT32 or kINT32
  size_t offset;                   // of the member in the struct
  bool required;
  bool is_array = false;      // the member is an Int32Array, and the type kINT32
  int32_t since_version = 1;  // of the schema; from 2 on the attribute is not required
};

struct AttributeSchema {
  char const* plugin;  // the plug-in's name
  // Of the state in serialised engines. It grows by 1 with every attribute that is added, and an engine of an earlier
  // version is read with that attribute's default: README.md. An engine of a later version is refused.
  int32_t version;
  std::vector<AttributeSpec> attributes;
};

// The functions below that read or check throw std::invalid_argument, which says what was given and what was expected.

// Returns the fields that a creator lists, without values.
std::vector<nvinfer1::PluginField> declare_fields(AttributeSchema const& schema);

// Reads attributes from the fields that a network's author gives.
void read_fields(AttributeSchema const& schema, nvinfer1::PluginFieldCollection const* fields, void* attributes);

// Write and read the state as fields, for IPluginV3: the attributes, and the schema's version in one field more. The
// fields point to the memory of both.
std::vector<nvinfer1::PluginField> write_state(AttributeSchema const& schema, void const* attributes);
void read_state(AttributeSchema const& schema, nvinfer1::PluginFieldCollection const* fields, void* attributes);

// Write and read the state as bytes, for IPluginV2.
size_t serialized_size(AttributeSchema const& schema, void const* attributes);
void serialize(AttributeSchema const& schema, void const* attributes, void* buffer);
void deserialize(AttributeSchema const& schema, void const* data, size_t size, void* attributes);

// Checks of values that several plug-ins share; `name` is the attribute's.
void require_flag(char const* name, int32_t value);
void require_positive(char const* name, float value);
void require_positive(char const* name, int32_t value);
void require_one_of(char const* name, int32_t value, std::vector<int32_t> const& allowed);
void require_type(char const* name, int32_t value, std::vector<nvinfer1::DataType> const& allowed);

// Returns float32, float16, and bfloat16 where this TensorRT has it.
std::vector<nvinfer1::DataType> floating_types();

// Returns the types of codes of 8 bits, int8 and float8 (e4m3). Those that are int32 to TensorRT, kCodesOfInt32 of them
// in each number, are left alone by every version; others must be a type that this TensorRT passes between layers.
std::vector<nvinfer1::DataType> code_types(bool as_int32);
constexpr int32_t kCodesOfInt32 = 4;

std::string type_name(nvinfer1::DataType type);

}  // namespace qwen_plugins
