// Attributes of an op: plain data under a name, read with a type. A wrong name or type is a bug in the
// lowering and says so.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <variant>
#include <vector>

namespace flatcore {

class ExternalFunction;

using Integers = std::vector<int64_t>;
using External = std::shared_ptr<const ExternalFunction>;
using Attribute = std::variant<bool, int64_t, double, std::string, Integers, External>;

class Attributes {
 public:
    Attributes() = default;
    explicit Attributes(std::map<std::string, Attribute> entries) : entries_(std::move(entries)) {}

    bool flag(const std::string& name) const { return get<bool>(name); }
    int64_t integer(const std::string& name) const { return get<int64_t>(name); }
    const std::string& text(const std::string& name) const { return get<std::string>(name); }
    const Integers& integers(const std::string& name) const { return get<Integers>(name); }

    const External& function(const std::string& name) const { return get<External>(name); }

    // Python writes 1 for 1.0, so a real may arrive as an integer.
    double real(const std::string& name) const {
        const Attribute& entry = find(name);
        if (const auto* integer = std::get_if<int64_t>(&entry)) return static_cast<double>(*integer);
        return get<double>(name);
    }
    double real_or(const std::string& name, double otherwise) const {
        return entries_.count(name) ? real(name) : otherwise;
    }

 private:
    const Attribute& find(const std::string& name) const {
        const auto entry = entries_.find(name);
        if (entry == entries_.end()) throw std::invalid_argument("attribute '" + name + "' is missing");
        return entry->second;
    }
    template <class T>
    const T& get(const std::string& name) const {
        const T* value = std::get_if<T>(&find(name));
        if (!value) throw std::invalid_argument("attribute '" + name + "' has the wrong type");
        return *value;
    }

    std::map<std::string, Attribute> entries_;
};

}  // namespace flatcore
