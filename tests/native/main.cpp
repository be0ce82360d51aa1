// Runs the tests whose names contain an argument, or all; those with "process" in their names first, since a process
// with threads cannot be forked safely.

#include "check.h"

#include <algorithm>
#include <chrono>

int main(int count, char** arguments) {
  using pp_runtime::native::Test;
  std::vector<Test> tests = pp_runtime::native::tests();
  std::stable_partition(tests.begin(), tests.end(),
                        [](const Test& test) { return test.name.find("process") != std::string::npos; });
  int ran = 0;
  for (const Test& test : tests) {
    const bool wanted = std::any_of(arguments + 1, arguments + count,
                                    [&](const std::string& text) { return test.name.find(text) != std::string::npos; });
    if (count > 1 && !wanted) {
      continue;
    }
    const auto begin = std::chrono::steady_clock::now();
    test.run();
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - begin;
    std::cout << test.name << ": " << taken.count() << " s" << std::endl;
    ++ran;
  }
  std::cout << ran << " tests passed" << std::endl;
  return ran > 0 ? 0 : 1;
}
