#include "attributes.h"

#include <cmath>
#include <cstring>
#include <stdexcept>

namespace qwen_plugins {
namespace {

using nvinfer1::DataType;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

constexpr size_t kAttributeSize = 4;
constexpr uint32_t kMagic = 0x51504C47;  // "QPLG"
constexpr uint32_t kFormatVersion = 1;

// Precedes the attributes in the serialised form. All members and attributes are little-endian, as TensorRT's hosts
// are.
struct Header {
  uint32_t magic;
  uint32_t format_version;
  uint32_t attribute_count;
  uint32_t checksum;  // of the plug-in's name and the attributes
};

[[noreturn]] void fail(std::string const& message) { throw std::invalid_argument(message); }

std::string field_type_name(PluginFieldType type) {
  switch (type) {
    case PluginFieldType::kFLOAT32:
      return "FLOAT32";
    case PluginFieldType::kINT32:
      return "INT32";
    default:
      return "PluginFieldType " + std::to_string(static_cast<int32_t>(type));
  }
}

std::string expected_names(AttributeSpecs const& specs) {
  std::string names;
  for (AttributeSpec const& spec : specs) {
    names += (names.empty() ? "" : ", ") + std::string(spec.name);
  }
  return names;
}

size_t find_attribute(AttributeSpecs const& specs, PluginField const& field) {
  if (field.name == nullptr) {
    fail("a field has no name; expected " + expected_names(specs));
  }
  for (size_t i = 0; i < specs.size(); ++i) {
    if (std::strcmp(specs[i].name, field.name) == 0) {
      return i;
    }
  }
  fail("unknown field '" + std::string(field.name) + "'; expected " + expected_names(specs));
}

void check_field(AttributeSpec const& spec, PluginField const& field) {
  std::string const name = "field '" + std::string(spec.name) + "' ";
  if (field.type != spec.type) {
    fail(name + "has type " + field_type_name(field.type) + "; expected " + field_type_name(spec.type));
  }
  if (field.length != 1) {
    fail(name + "has " + std::to_string(field.length) + " values; expected 1");
  }
  if (field.data == nullptr) {
    fail(name + "has no data");
  }
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

void read_fields(AttributeSpecs const& specs, nvinfer1::PluginFieldCollection const* fields, void* attributes) {
  if (fields == nullptr || fields->nbFields < 0 || (fields->nbFields > 0 && fields->fields == nullptr)) {
    fail("no field collection; expected fields " + expected_names(specs));
  }
  std::vector<bool> seen(specs.size(), false);
  for (int32_t i = 0; i < fields->nbFields; ++i) {
    PluginField const& field = fields->fields[i];
    size_t const index = find_attribute(specs, field);
    check_field(specs[index], field);
    if (seen[index]) {
      fail("field '" + std::string(specs[index].name) + "' is given twice");
    }
    seen[index] = true;
    std::memcpy(static_cast<char*>(attributes) + specs[index].offset, field.data, kAttributeSize);
  }
  for (size_t i = 0; i < specs.size(); ++i) {
    if (specs[i].required && !seen[i]) {
      fail("required field '" + std::string(specs[i].name) + "' is missing");
    }
  }
}

std::vector<PluginField> write_fields(AttributeSpecs const& specs, void const* attributes) {
  std::vector<PluginField> fields;
  for (AttributeSpec const& spec : specs) {
    void const* data = attributes == nullptr ? nullptr : static_cast<char const*>(attributes) + spec.offset;
    fields.emplace_back(spec.name, data, spec.type, 1);
  }
  return fields;
}

size_t serialized_size(AttributeSpecs const& specs) { return sizeof(Header) + specs.size() * kAttributeSize; }

void serialize(AttributeSpecs const& specs, char const* plugin_name, void const* attributes, void* buffer) {
  auto* values = static_cast<unsigned char*>(buffer) + sizeof(Header);
  for (size_t i = 0; i < specs.size(); ++i) {
    std::memcpy(values + i * kAttributeSize, static_cast<char const*>(attributes) + specs[i].offset, kAttributeSize);
  }
  Header const header{kMagic, kFormatVersion, static_cast<uint32_t>(specs.size()),
                      checksum(plugin_name, values, specs.size() * kAttributeSize)};
  std::memcpy(buffer, &header, sizeof(header));
}

void deserialize(AttributeSpecs const& specs, char const* plugin_name, void const* data, size_t size,
                 void* attributes) {
  std::string const expected = "; expected " + std::to_string(serialized_size(specs)) + " bytes";
  if (data == nullptr || size < sizeof(Header)) {
    fail("serialised plug-in has " + std::to_string(data == nullptr ? 0 : size) + " bytes" + expected);
  }
  Header header;
  std::memcpy(&header, data, sizeof(header));
  if (header.magic != kMagic) {
    fail("serialised plug-in is not one of this library (wrong first bytes)");
  }
  if (header.format_version != kFormatVersion || header.attribute_count != specs.size()) {
    fail("serialised plug-in has format version " + std::to_string(header.format_version) + " with " +
         std::to_string(header.attribute_count) + " attributes; this library reads version " +
         std::to_string(kFormatVersion) + " with " + std::to_string(specs.size()) +
         ". Build the engine again with the installed qwen_plugins");
  }
  if (size != serialized_size(specs)) {
    fail("serialised plug-in has " + std::to_string(size) + " bytes" + expected);
  }
  auto const* values = static_cast<unsigned char const*>(data) + sizeof(Header);
  if (header.checksum != checksum(plugin_name, values, size - sizeof(Header))) {
    fail("serialised plug-in is corrupted (checksum mismatch)");
  }
  for (size_t i = 0; i < specs.size(); ++i) {
    std::memcpy(static_cast<char*>(attributes) + specs[i].offset, values + i * kAttributeSize, kAttributeSize);
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

void require_type(char const* name, int32_t value, std::vector<DataType> const& allowed) {
  std::string expected;
  for (DataType const type : allowed) {
    if (value == static_cast<int32_t>(type)) {
      return;
    }
    expected +=
        (expected.empty() ? "" : ", ") + std::to_string(static_cast<int32_t>(type)) + " (" + type_name(type) + ")";
  }
  fail("field '" + std::string(name) + "' is " + std::to_string(value) + "; expected " + expected);
}

std::vector<DataType> floating_types() {
#if QWEN_PLUGINS_TENSORRT_MAJOR >= 10
  return {DataType::kFLOAT, DataType::kHALF, DataType::kBF16};
#else
  return {DataType::kFLOAT, DataType::kHALF};
#endif
}

std::string type_name(DataType type) {
  switch (static_cast<int32_t>(type)) {
    case 0:
      return "float32";
    case 1:
      return "float16";
    case 2:
      return "int8";
    case 3:
      return "int32";
    case 6:
      return "float8_e4m3fn";
    case 7:
      return "bfloat16";
    default:
      return "DataType " + std::to_string(static_cast<int32_t>(type));
  }
}

}  // namespace qwen_plugins
