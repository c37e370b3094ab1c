// The threads of a block that can run, by index, and which of them runs next.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace variant::emulation {

constexpr unsigned kMaxThreads = 1024;  // of a block

enum class Order { kForward, kBackward, kRandom };

inline unsigned lowest_bit(uint64_t bits) { return static_cast<unsigned>(__builtin_ctzll(bits)); }
inline unsigned highest_bit(uint64_t bits) {
  return 63 - static_cast<unsigned>(__builtin_clzll(bits));
}

// Every wait of a thread takes one, so no operation looks at all threads.
class ReadyThreads {
 public:
  void set_order(Order order) { order_ = order; }

  void clear() {
    listed_.clear();
    for (uint64_t& word : words_) word = 0;
    count_ = 0;
  }

  bool empty() const { return count_ == 0; }

  // A thread is added at most once until it is taken.
  void add(unsigned index) {
    ++count_;
    if (order_ == Order::kRandom) {
      listed_.push_back(index);
    } else {
      words_[index / 64] |= uint64_t{1} << index % 64;
    }
  }

  // Removes the lowest thread, the highest, or a random one; there must be one. below(n) is a
  // random number from 0 to n - 1.
  template <class Below>
  unsigned take(Below below) {
    --count_;
    if (order_ == Order::kRandom) {
      unsigned& picked = listed_[below(listed_.size())];
      const unsigned index = picked;
      picked = listed_.back();
      listed_.pop_back();
      return index;
    }
    const bool forward = order_ == Order::kForward;
    unsigned word = forward ? 0 : kWords - 1;
    while (words_[word] == 0) word += forward ? 1 : -1;
    const unsigned bit = forward ? lowest_bit(words_[word]) : highest_bit(words_[word]);
    words_[word] &= ~(uint64_t{1} << bit);
    return 64 * word + bit;
  }

 private:
  static constexpr unsigned kWords = kMaxThreads / 64;

  Order order_ = Order::kForward;
  std::vector<unsigned> listed_;  // in a random order
  uint64_t words_[kWords] = {};   // otherwise a bit for each thread
  size_t count_ = 0;
};

}  // namespace variant::emulation
