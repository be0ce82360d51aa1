#pragma once

#include <cstdlib>
#include <functional>
#include <iostream>
#include <string>
#include <vector>

namespace pp_runtime::native {

struct Test {
  std::string name;
  std::function<void()> run;
};

/// Every test of the program, in the order of the files that define them.
inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

struct Registration {
  Registration(const char* name, std::function<void()> run) { tests().push_back({name, std::move(run)}); }
};

[[noreturn]] inline void fail(const char* file, int line, const std::string& what) {
  std::cerr << file << ":" << line << ": " << what << std::endl;
  std::abort();
}

/// What the call throws as `Error`; fails where it throws nothing or something else.
template <typename Error, typename Call>
std::string error_of(const char* file, int line, const Call& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  } catch (const std::exception& other) {
    fail(file, line, std::string("another error came: ") + other.what());
  }
  fail(file, line, "no error came");
}

}  // namespace pp_runtime::native

#define EXPECT(...)                                                     \
  do {                                                                  \
    if (!(__VA_ARGS__)) {                                               \
      ::pp_runtime::native::fail(__FILE__, __LINE__, "#" #__VA_ARGS__); \
    }                                                                   \
  } while (false)

#define ERROR_OF(Error, ...) \
  ::pp_runtime::native::error_of<Error>(__FILE__, __LINE__, [&] { static_cast<void>(__VA_ARGS__); })

#define TEST(name)                                                                  \
  static void name();                                                               \
  static const ::pp_runtime::native::Registration registration_##name(#name, name); \
  static void name()
