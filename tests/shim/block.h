// Runs the threads of a block, which may wait for each other, on one thread of the CPU.
#pragma once

#include <ucontext.h>

#include <cstddef>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace shim {

// One thread of the block after the other runs until it ends or waits. One that waits keeps its
// stack, and the next goes on with another: kernels whose threads never wait take a single one.
// When each has ended or waits, those that wait go on.
class Block {
 public:
  // Runs `body` for threads [0, count); `set_thread` is told which one goes on.
  void run(unsigned count, const std::function<void(unsigned)>& set_thread,
           const std::function<void()>& body) {
    next_ = 0;
    count_ = count;
    set_thread_ = &set_thread;
    body_ = &body;
    while (next_ < count_) enter(idle());
    while (!waiting_.empty())
      for (Stack* stack : std::exchange(waiting_, {})) {
        set_thread(stack->thread);
        enter(*stack);
      }
  }

  // Called by a thread of the block.
  void wait() {
    waiting_.push_back(running_);
    leave(*running_);
  }

 private:
  static constexpr size_t bytes = 1 << 18;

  struct Stack {
    ucontext_t context;
    std::unique_ptr<char[]> memory{new char[bytes]};
    void* sanitized = nullptr;
    unsigned thread = 0;
    bool idle = true;
  };

  Stack& idle() {
    for (const auto& stack : stacks_)
      if (stack->idle) return *stack;
    stacks_.push_back(std::make_unique<Stack>());
    Stack& stack = *stacks_.back();
    getcontext(&stack.context);
    stack.context.uc_stack.ss_sp = stack.memory.get();
    stack.context.uc_stack.ss_size = bytes;
    stack.context.uc_link = nullptr;
    makecontext(&stack.context, &Block::start, 0);
    return stack;
  }

  // On a stack of its own: takes threads that have not begun, again and again.
  static void start() {
    Block& block = *current();
    block.arrive(nullptr);
    Stack& stack = *block.running_;
    for (;;) {
      while (block.next_ < block.count_) {
        stack.thread = block.next_++;
        (*block.set_thread_)(stack.thread);
        (*block.body_)();
      }
      stack.idle = true;
      block.leave(stack);
    }
  }

  void enter(Stack& stack) {
    running_ = &stack;
    stack.idle = false;
    current() = this;
#if defined(__SANITIZE_ADDRESS__)
    void* sanitized = nullptr;
    __sanitizer_start_switch_fiber(&sanitized, stack.memory.get(), bytes);
    swapcontext(&context_, &stack.context);
    __sanitizer_finish_switch_fiber(sanitized, nullptr, nullptr);
#else
    swapcontext(&context_, &stack.context);
#endif
  }

  void leave(Stack& stack) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&stack.sanitized, bottom_, size_);
#endif
    swapcontext(&stack.context, &context_);
    arrive(stack.sanitized);
  }

  // Now on another stack than before.
  void arrive([[maybe_unused]] void* sanitized) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(sanitized, &bottom_, &size_);
#endif
  }

  static Block*& current() {
    static thread_local Block* block = nullptr;
    return block;
  }

  ucontext_t context_;
  [[maybe_unused]] const void* bottom_ = nullptr;  // of the stack that run() is called on
  [[maybe_unused]] size_t size_ = 0;
  std::vector<std::unique_ptr<Stack>> stacks_;
  std::vector<Stack*> waiting_;
  Stack* running_ = nullptr;
  unsigned next_ = 0, count_ = 0;
  const std::function<void(unsigned)>* set_thread_ = nullptr;
  const std::function<void()>* body_ = nullptr;
};

inline thread_local Block block;

}  // namespace shim
