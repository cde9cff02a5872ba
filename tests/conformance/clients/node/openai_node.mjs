// openai-node. Fields that it does not know are sent as they are.
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";
import {
  base, called, model, person, prompt, run, same, steered, steering, tokens, url, weather,
} from "./checks.mjs";

const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const Person = z.object({ name: z.string(), age: z.number().int() });
const asked = (text, fields = {}) => ({
  model,
  messages: [{ role: "user", content: text }],
  temperature: 0,
  max_tokens: tokens,
  ...fields,
});

await run({
  async chat() {
    const answer = await client.chat.completions.create(asked(prompt));
    same(answer.choices[0].message.content, base);
  },
  async stream() {
    let text = "";
    for await (const chunk of await client.chat.completions.create(asked(prompt, { stream: true }))) {
      text += chunk.choices[0]?.delta?.content ?? "";
    }
    same(text, base);
  },
  async steering() {
    const answer = await client.chat.completions.create(asked(prompt, { steering }));
    same(answer.choices[0].message.content, steered);
  },
  async tool() {
    const parameters = z.toJSONSchema(z.object({ city: z.string() }));
    const tools = [{ type: "function", function: { name: "get_weather", parameters } }];
    const stream = client.chat.completions.stream(
      asked(weather, { tools, tool_choice: "required", max_tokens: 60 }),
    );
    const [call] = (await stream.finalChatCompletion()).choices[0].message.tool_calls;
    called(call.function.name, JSON.parse(call.function.arguments));
  },
  async structure() {
    const response_format = zodResponseFormat(Person, "person");
    const answer = await client.chat.completions.parse(
      asked(person, { response_format, max_tokens: 60 }),
    );
    Person.parse(answer.choices[0].message.parsed);
  },
  async responses() {
    const answer = await client.responses.create({
      model, input: prompt, temperature: 0, max_output_tokens: tokens, steering,
    });
    same(answer.output_text, steered);
  },
});
