// Objects that Python knows by their numbers, until it drops them.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>

namespace fusedres::front {

// name: what one is called in an error. A store is made once and never destroyed: threads may ask as the process ends.
template <class T>
class Store {
 public:
  explicit Store(const char* name) : name_(name) {}

  int64_t add(T value) {
    const std::lock_guard lock(mutex_);
    values_.emplace(++last_, std::make_shared<const T>(std::move(value)));
    return last_;
  }
  // What goes with the value goes behind the lock: a tensor's end may run Python, and that may come here again.
  void drop(int64_t number) {
    std::shared_ptr<const T> dropped;
    const std::lock_guard lock(mutex_);
    const auto found = values_.find(number);
    if (found == values_.end()) return;
    dropped = std::move(found->second);
    values_.erase(found);
  }
  std::shared_ptr<const T> at(int64_t number) const {
    const std::lock_guard lock(mutex_);
    const auto found = values_.find(number);
    if (found == values_.end()) {
      throw std::runtime_error(std::string("fusedres: there is no ") + name_ + " " + std::to_string(number) + ".");
    }
    return found->second;
  }

 private:
  const char* name_;
  mutable std::mutex mutex_;
  std::unordered_map<int64_t, std::shared_ptr<const T>> values_;
  int64_t last_ = 0;
};

}  // namespace fusedres::front
