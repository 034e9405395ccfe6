#include "attributes.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "kernels/common/data_type.h"

namespace qwen_plugins {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

constexpr size_t kAttributeSize = 4;
// An array is written as the part of the member that is in use.
static_assert(offsetof(Int32Array, size) == 0 && offsetof(Int32Array, values) == kAttributeSize);
constexpr char const* kSchemaField = "schema_version";
constexpr uint32_t kMagic = 0x51504C47;  // "QPLG"

// Precedes the attributes where the state is bytes. All members and attributes are little-endian, as on every host that
// TensorRT runs on. An array is its size and then its values.
struct Header {
  uint32_t magic;
  int32_t schema_version;
  uint32_t attribute_count;
  uint32_t checksum;  // of the plug-in's name and the attributes
};

// Fields and launches use one numbering of types.
constexpr bool same(DataType ours, nvinfer1::DataType theirs) {
  return static_cast<int32_t>(ours) == static_cast<int32_t>(theirs);
}
static_assert(same(DataType::kFloat32, nvinfer1::DataType::kFLOAT));
static_assert(same(DataType::kFloat16, nvinfer1::DataType::kHALF));
static_assert(same(DataType::kInt8, nvinfer1::DataType::kINT8));
static_assert(same(DataType::kInt32, nvinfer1::DataType::kINT32));
static_assert(same(DataType::kFloat8E4M3, nvinfer1::DataType::kFP8));
#if QWEN_PLUGINS_TENSORRT_MAJOR >= 10
static_assert(same(DataType::kBFloat16, nvinfer1::DataType::kBF16));
#endif

[[noreturn]] void fail(std::string const& message) { throw std::invalid_argument(message); }

[[noreturn]] void refuse_version(AttributeSchema const& schema, std::string const& found) {
  std::string const versions = (schema.version == 1 ? " " : "s 1 to ") + std::to_string(schema.version);
  fail("serialised plug-in has " + found + "; this library reads schema version" + versions +
       ". Build the engine again with the installed qwen_plugins");
}

void check_version(AttributeSchema const& schema, int32_t version) {
  if (version < 1 || version > schema.version) {
    refuse_version(schema, "schema version " + std::to_string(version));
  }
}

// Returns names[number], or `kind` and the number where there is none.
template <size_t kCount>
std::string name_of(char const* const (&names)[kCount], char const* kind, int32_t number) {
  bool const known = number >= 0 && static_cast<size_t>(number) < kCount;
  return known ? names[number] : std::string(kind) + " " + std::to_string(number);
}

std::string field_type_name(PluginFieldType type) {
  static constexpr char const* kNames[] = {"FLOAT16", "FLOAT32", "FLOAT64", "INT8",  "INT16", "INT32", "CHAR",
                                           "DIMS",    "UNKNOWN", "BF16",    "INT64", "FP8",   "INT4",  "FP4"};
  return name_of(kNames, "PluginFieldType", static_cast<int32_t>(type));
}

std::string expected_names(AttributeSchema const& schema) {
  std::string names;
  for (AttributeSpec const& spec : schema.attributes) {
    names += (names.empty() ? "" : ", ") + std::string(spec.name);
  }
  return names;
}

void check_collection(AttributeSchema const& schema, nvinfer1::PluginFieldCollection const* fields) {
  if (fields == nullptr || fields->nbFields < 0 || (fields->nbFields > 0 && fields->fields == nullptr)) {
    fail("no field collection; expected fields " + expected_names(schema));
  }
}

size_t find_attribute(AttributeSchema const& schema, PluginField const& field) {
  if (field.name == nullptr) {
    fail("a field has no name; expected " + expected_names(schema));
  }
  for (size_t i = 0; i < schema.attributes.size(); ++i) {
    if (std::strcmp(schema.attributes[i].name, field.name) == 0) {
      return i;
    }
  }
  fail("unknown field '" + std::string(field.name) + "'; expected " + expected_names(schema));
}

void check_field(AttributeSpec const& spec, PluginField const& field) {
  std::string const subject = "field '" + std::string(spec.name) + "' ";
  if (field.type != spec.type) {
    fail(subject + "has type " + field_type_name(field.type) + "; expected " + field_type_name(spec.type));
  }
  if (spec.is_array ? field.length < 0 || field.length > Int32Array::kMaxSize : field.length != 1) {
    std::string const expected = spec.is_array ? "0 to " + std::to_string(Int32Array::kMaxSize) : "1";
    fail(subject + "has " + std::to_string(field.length) + " values; expected " + expected);
  }
  if (field.data == nullptr && field.length > 0) {
    fail(subject + "has no data");
  }
}

// The member of an attribute. An array's size comes first.
char* member_of(AttributeSpec const& spec, void* attributes) { return static_cast<char*>(attributes) + spec.offset; }
char const* member_of(AttributeSpec const& spec, void const* attributes) {
  return static_cast<char const*>(attributes) + spec.offset;
}
Int32Array const& array_of(AttributeSpec const& spec, void const* attributes) {
  return *reinterpret_cast<Int32Array const*>(member_of(spec, attributes));
}

void read_field(AttributeSpec const& spec, PluginField const& field, void* attributes) {
  char* member = member_of(spec, attributes);
  if (spec.is_array) {
    std::memcpy(member, &field.length, kAttributeSize);
    member += offsetof(Int32Array, values);
  }
  if (field.length > 0) {
    std::memcpy(member, field.data, static_cast<size_t>(field.length) * kAttributeSize);
  }
}

// The attributes that the state of a schema version has.
std::vector<AttributeSpec> specs_of(AttributeSchema const& schema, int32_t version) {
  std::vector<AttributeSpec> specs;
  for (AttributeSpec const& spec : schema.attributes) {
    if (spec.since_version <= version) {
      specs.push_back(spec);
    }
  }
  return specs;
}

// The bytes of an attribute: the member, of an array its size and as many values.
size_t bytes_of(AttributeSpec const& spec, int32_t array_size) {
  return (spec.is_array ? 1 + static_cast<size_t>(array_size) : 1) * kAttributeSize;
}

// The size that state as bytes should have, by the sizes of the arrays in it. Nothing past `size` is read.
size_t expected_size(std::vector<AttributeSpec> const& specs, unsigned char const* data, size_t size) {
  size_t position = sizeof(Header);
  for (AttributeSpec const& spec : specs) {
    int32_t array_size = 0;
    if (spec.is_array && position + kAttributeSize <= size) {
      std::memcpy(&array_size, data + position, kAttributeSize);
    }
    if (array_size < 0 || array_size > Int32Array::kMaxSize) {
      fail("serialised plug-in has " + std::to_string(array_size) + " values of '" + spec.name + "'; expected 0 to " +
           std::to_string(Int32Array::kMaxSize));
    }
    position += bytes_of(spec, array_size);
  }
  return position;
}

bool is_schema_version(PluginField const& field) {
  return field.name != nullptr && std::strcmp(field.name, kSchemaField) == 0;
}

// FNV-1a, http://www.isthe.com/chongo/tech/comp/fnv
uint32_t checksum(char const* plugin_name, unsigned char const* data, size_t size) {
  uint32_t hash = 2166136261U;
  auto const add = [&hash](unsigned char byte) { hash = (hash ^ byte) * 16777619U; };
  for (char const* c = plugin_name; *c != '\0'; ++c) {
    add(static_cast<unsigned char>(*c));
  }
  for (size_t i = 0; i < size; ++i) {
    add(data[i]);
  }
  return hash;
}

}  // namespace

std::vector<PluginField> declare_fields(AttributeSchema const& schema) {
  std::vector<PluginField> fields;
  for (AttributeSpec const& spec : schema.attributes) {
    fields.emplace_back(spec.name, nullptr, spec.type, spec.is_array ? 0 : 1);
  }
  return fields;
}

void read_fields(AttributeSchema const& schema, nvinfer1::PluginFieldCollection const* fields, void* attributes) {
  check_collection(schema, fields);
  std::vector<AttributeSpec> const& specs = schema.attributes;
  std::vector<bool> seen(specs.size(), false);
  for (int32_t i = 0; i < fields->nbFields; ++i) {
    PluginField const& field = fields->fields[i];
    size_t const index = find_attribute(schema, field);
    check_field(specs[index], field);
    if (seen[index]) {
      fail("field '" + std::string(specs[index].name) + "' is given twice");
    }
    seen[index] = true;
    read_field(specs[index], field, attributes);
  }
  for (size_t i = 0; i < specs.size(); ++i) {
    if (specs[i].required && !seen[i]) {
      fail("required field '" + std::string(specs[i].name) + "' is missing");
    }
  }
}

std::vector<PluginField> write_state(AttributeSchema const& schema, void const* attributes) {
  std::vector<PluginField> fields;
  for (AttributeSpec const& spec : schema.attributes) {
    if (!spec.is_array) {
      fields.emplace_back(spec.name, member_of(spec, attributes), spec.type, 1);
    } else if (Int32Array const& array = array_of(spec, attributes); array.size > 0) {
      fields.emplace_back(spec.name, array.values.data(), spec.type, array.size);
    }
  }
  fields.emplace_back(kSchemaField, &schema.version, PluginFieldType::kINT32, 1);
  return fields;
}

void read_state(AttributeSchema const& schema, nvinfer1::PluginFieldCollection const* fields, void* attributes) {
  check_collection(schema, fields);
  std::vector<PluginField> others(fields->fields, fields->fields + fields->nbFields);
  auto const found = std::find_if(others.begin(), others.end(), is_schema_version);
  if (found == others.end()) {
    refuse_version(schema, "no schema version");
  }
  check_field({kSchemaField, PluginFieldType::kINT32, 0, true}, *found);
  int32_t version = 0;
  std::memcpy(&version, found->data, sizeof(version));
  check_version(schema, version);
  others.erase(found);
  nvinfer1::PluginFieldCollection const rest{static_cast<int32_t>(others.size()), others.data()};
  read_fields(schema, &rest, attributes);
}

size_t serialized_size(AttributeSchema const& schema, void const* attributes) {
  size_t size = sizeof(Header);
  for (AttributeSpec const& spec : schema.attributes) {
    size += bytes_of(spec, spec.is_array ? array_of(spec, attributes).size : 0);
  }
  return size;
}

void serialize(AttributeSchema const& schema, void const* attributes, void* buffer) {
  auto* const values = static_cast<unsigned char*>(buffer) + sizeof(Header);
  unsigned char* to = values;
  for (AttributeSpec const& spec : schema.attributes) {
    size_t const bytes = bytes_of(spec, spec.is_array ? array_of(spec, attributes).size : 0);
    std::memcpy(to, member_of(spec, attributes), bytes);
    to += bytes;
  }
  Header const header{kMagic, schema.version, static_cast<uint32_t>(schema.attributes.size()),
                      checksum(schema.plugin, values, static_cast<size_t>(to - values))};
  std::memcpy(buffer, &header, sizeof(header));
}

void deserialize(AttributeSchema const& schema, void const* data, size_t size, void* attributes) {
  auto const* const bytes = static_cast<unsigned char const*>(data);
  if (data == nullptr || size < sizeof(Header)) {
    fail("serialised plug-in has " + std::to_string(data == nullptr ? 0 : size) + " bytes; expected " +
         std::to_string(expected_size(schema.attributes, nullptr, 0)) + " bytes");
  }
  Header header;
  std::memcpy(&header, data, sizeof(header));
  if (header.magic != kMagic) {
    fail("serialised plug-in is not one of this library (wrong first bytes)");
  }
  check_version(schema, header.schema_version);
  std::vector<AttributeSpec> const specs = specs_of(schema, header.schema_version);
  if (header.attribute_count != specs.size()) {
    fail("serialised plug-in has " + std::to_string(header.attribute_count) + " attributes; expected " +
         std::to_string(specs.size()));
  }
  if (size_t const expected = expected_size(specs, bytes, size); size != expected) {
    fail("serialised plug-in has " + std::to_string(size) + " bytes; expected " + std::to_string(expected) + " bytes");
  }
  unsigned char const* from = bytes + sizeof(Header);
  if (header.checksum != checksum(schema.plugin, from, size - sizeof(Header))) {
    fail("serialised plug-in is corrupted (checksum mismatch)");
  }
  for (AttributeSpec const& spec : specs) {
    int32_t array_size = 0;
    if (spec.is_array) {
      std::memcpy(&array_size, from, kAttributeSize);
    }
    std::memcpy(member_of(spec, attributes), from, bytes_of(spec, array_size));
    from += bytes_of(spec, array_size);
  }
}

void require_flag(char const* name, int32_t value) {
  if (value != 0 && value != 1) {
    fail("field '" + std::string(name) + "' is " + std::to_string(value) + "; expected 0 or 1");
  }
}

void require_positive(char const* name, float value) {
  if (!std::isfinite(value) || value <= 0.0F) {
    fail("field '" + std::string(name) + "' is " + std::to_string(value) + "; expected a finite number above 0");
  }
}

void require_positive(char const* name, int32_t value) {
  if (value <= 0) {
    fail("field '" + std::string(name) + "' is " + std::to_string(value) + "; expected a number above 0");
  }
}

void require_one_of(char const* name, int32_t value, std::vector<int32_t> const& allowed) {
  std::string expected;
  for (int32_t const number : allowed) {
    if (value == number) {
      return;
    }
    expected += (expected.empty() ? "" : ", ") + std::to_string(number);
  }
  fail("field '" + std::string(name) + "' is " + std::to_string(value) + "; expected one of " + expected);
}

void require_type(char const* name, int32_t value, std::vector<nvinfer1::DataType> const& allowed) {
  std::string expected;
  for (nvinfer1::DataType const type : allowed) {
    if (value == static_cast<int32_t>(type)) {
      return;
    }
    expected +=
        (expected.empty() ? "" : ", ") + std::to_string(static_cast<int32_t>(type)) + " (" + type_name(type) + ")";
  }
  fail("field '" + std::string(name) + "' is " + std::to_string(value) + "; expected " + expected);
}

std::vector<nvinfer1::DataType> floating_types() {
#if QWEN_PLUGINS_TENSORRT_MAJOR >= 10
  return {nvinfer1::DataType::kFLOAT, nvinfer1::DataType::kHALF, nvinfer1::DataType::kBF16};
#else
  return {nvinfer1::DataType::kFLOAT, nvinfer1::DataType::kHALF};
#endif
}

std::vector<nvinfer1::DataType> code_types(bool as_int32) {
  if (as_int32 || QWEN_PLUGINS_TENSORRT_MAJOR >= 10) {
    return {nvinfer1::DataType::kINT8, nvinfer1::DataType::kFP8};
  }
  return {nvinfer1::DataType::kINT8};
}

std::string type_name(nvinfer1::DataType type) {
  static constexpr char const* kNames[] = {"float32",       "float16",  "int8",  "int32", "bool",   "uint8",
                                           "float8_e4m3fn", "bfloat16", "int64", "int4",  "float4", "float8_e8m0fnu"};
  return name_of(kNames, "DataType", static_cast<int32_t>(type));
}

}  // namespace qwen_plugins
