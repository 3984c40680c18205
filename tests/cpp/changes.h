// Patterns that change, damaged ones, and errors in threads.
#pragma once

namespace test {

// Ends the process with a line that says what is wrong.
void check_changes();

}  // namespace test
