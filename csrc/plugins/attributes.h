// A plug-in's attributes: a plain struct of 32-bit members and a table that names them. The table gives everything that
// crosses TensorRT's border: the creator's field list, a struct from fields, fields from a struct, bytes and back.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

#include "tensorrt_api.h"

namespace qwen_plugins {

struct AttributeSpec {
  char const* name;
  nvinfer1::PluginFieldType type;  // kFLOAT32 or kINT32
  size_t offset;                   // of the member in the struct
  bool required;
};

using AttributeSpecs = std::vector<AttributeSpec>;

// All of these throw std::invalid_argument with what was given and what was expected.
void read_fields(AttributeSpecs const& specs, nvinfer1::PluginFieldCollection const* fields, void* attributes);
std::vector<nvinfer1::PluginField> write_fields(AttributeSpecs const& specs, void const* attributes);

size_t serialized_size(AttributeSpecs const& specs);
void serialize(AttributeSpecs const& specs, char const* plugin_name, void const* attributes, void* buffer);
void deserialize(AttributeSpecs const& specs, char const* plugin_name, void const* data, size_t size, void* attributes);

// Rules that several plug-ins share; `name` is the attribute's.
void require_flag(char const* name, int32_t value);
void require_positive(char const* name, float value);
void require_positive(char const* name, int32_t value);
void require_one_of(char const* name, int32_t value, std::vector<int32_t> const& allowed);
void require_type(char const* name, int32_t value, std::vector<nvinfer1::DataType> const& allowed);

// float32, float16, and bfloat16 where this TensorRT has it.
std::vector<nvinfer1::DataType> floating_types();

std::string type_name(nvinfer1::DataType type);

}  // namespace qwen_plugins
