// Draws digits from a packaged step with libtorch alone: neither Python nor dgfast.
//
//   python -m dgfast.export.to_package --what step --batch 40 --device cpu --out exported
//   TORCH=$(python -c "import torch; print(torch.__path__[0])")
//   g++ -std=c++20 -I$TORCH/include -I$TORCH/include/torch/csrc/api/include examples/package_only.cpp -o package_only \
//       -L$TORCH/lib -Wl,-rpath,$TORCH/lib -Wl,--no-as-needed -ltorch_cpu -ltorch -lc10
//   ./package_only exported/mnist32-step-b40-float32-cpu.pt2 digits.pgm
#include <ATen/Context.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/full.h>
#include <ATen/ops/randn.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/headeronly/version.h>
#include <fstream>
#include <iostream>
#include <regex>

using Loader = torch::inductor::AOTIModelPackageLoader;
using Texts = std::vector<std::string>;
const char *NAME = "[a-z_0-9]*[a-z][a-z_0-9]*", *NUMBER = "-?[0-9][-+.e0-9]*";

Texts all(const std::string& text, const char* pattern) {  // the matches in a text of JSON
  const std::regex regex(pattern);
  return {std::sregex_token_iterator(text.begin(), text.end(), regex), std::sregex_token_iterator()};
}

int main(int argc, char** argv) try {
  if (argc != 3) throw std::runtime_error("usage: package_only STEP.pt2 PICTURE.pgm");
  auto said = Loader::load_metadata_from_package(argv[1], "model");  // without loading its code
  const Texts shape = all(said.at("arguments"), NUMBER);
  const long batch = std::stol(shape[0]), side = std::stol(shape[3]), rows = batch / 10;
  if (said.at("what") != "step" || batch % 10) throw std::runtime_error("make it with --what step --batch 40");
  if (said.at("made_for").rfind("torch " TORCH_VERSION, 0)) throw std::runtime_error("for " + said.at("made_for"));
  const Texts names = all(said.at("inputs"), NAME), levels = all(said.at("sigmas"), NUMBER);
  const Texts weights = all(said.at("weights"), NAME), values = all(said.at("weights"), NUMBER);
  const c10::InferenceMode no_gradients;
  Loader step(argv[1]);
  at::manual_seed(0);
  at::Tensor x = at::randn({batch, 1, side, side}).mul(std::stod(levels[0]));
  for (size_t i = 0; i + 1 < levels.size(); ++i) {
    std::unordered_map<std::string, at::Tensor> named{{"x", x}};
    named["sigma"] = at::full({batch}, std::stod(levels[i]));
    named["sigma_next"] = at::full({batch}, std::stod(levels[i + 1]));
    named["class_labels"] = at::eye(10).repeat_interleave(rows, 0);
    for (size_t k = 0; k < weights.size(); ++k) named[weights[k]] = at::full({1}, std::stod(values[k]));
    std::vector<at::Tensor> inputs;
    for (const auto& name : names) inputs.push_back(named.at(name));
    x = step.run(inputs)[0].contiguous();
  }
  const auto pixels = x.mul(127.5).add(128).clamp(0, 255).to(at::kByte).view({10, rows, side, side});
  const auto grid = pixels.permute({1, 2, 0, 3}).contiguous();
  std::ofstream file(argv[2], std::ios::binary);
  file << "P5 " << 10 * side << " " << rows * side << " 255\n";
  file.write(reinterpret_cast<const char*>(grid.const_data_ptr()), grid.numel()).flush();
  return file ? 0 : throw std::runtime_error(std::string("cannot write ") + argv[2]);
} catch (const std::exception& error) {
  const std::string text = error.what();
  return std::cerr << text.substr(0, text.find('\n')) << '\n', 2;
}
